"""Targets in `transformers.Trainer` and TRL's `SFTTrainer`: the same weights as our own trainer."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from qpipe.pipeline import decoder, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.mixing import write_mix
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data import dataset as dataset_module
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.integrations import (
    TargetCollator,
    TargetDataset,
    target_loss,
    target_objective,
    with_target_loss,
)
from qpipe.trainer.loss.sparse import target_losses
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ..support.runs import Examples, Make

STEPS = 3
LIVE = {
    "method": "iw-sft",
    "form": "live",
    "parameters": {"T": 1.0},
    "residual": "base-observed",
    "tail_shape": "student",
}


def same(row: dict[str, Any], example: TargetExample) -> bool:
    return all(
        value == example.id if name == "id" else np.array_equal(value, getattr(example, name))
        for name, value in row.items()
    )


# The data set


def test_rows_are_those_of_the_folder_in_any_order(targets: Path) -> None:
    rows, wanted = TargetDataset(targets), list(read_targets(targets))
    assert len(rows) == len(wanted) == 30
    for index in (0, 29, 13, 13, -1, 5):
        assert same(rows[index], wanted[index])
    together = rows.__getitems__([29, 2, 2, 17])
    assert [row["id"] for row in together] == [wanted[index].id for index in (29, 2, 2, 17)]
    with pytest.raises(IndexError, match="row 30 of 30"):
        rows[30]
    assert len([*rows]) == 30


def test_few_record_batches_stay_in_memory(make_targets: Make, make_examples: Examples) -> None:
    rows = TargetDataset(make_targets(make_examples(40), rows=2))
    for index in range(40):
        _ = rows[index]
    assert [block for _, block in rows._cached] == list(
        range(20 - dataset_module.CACHED_BLOCKS, 20)
    )
    assert not pickle.loads(pickle.dumps(rows))._cached


def test_a_mixture_has_its_parts_in_proportion(
    make_targets: Make, make_examples: Examples, tmp_path: Path
) -> None:
    parts = []
    for name, count in (("five", 5), ("seven", 7)):
        examples = [replace(each, id=f"{name} {each.id}") for each in make_examples(count)]
        parts.append(make_targets(examples, name=name))
    write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1)])
    rows = TargetDataset(tmp_path / "mixed")
    ids = [[example.id for example in read_targets(part)] for part in parts]
    found = [row["id"] for row in rows]
    assert len(found) == 12
    assert [each for each in found if each in ids[0]] == (ids[0] * 2)[:9]
    assert [each for each in found if each in ids[1]] == ids[1][:3]
    assert [row["id"] for row in rows.__getitems__([11, 0, 5, 5])] == [
        found[index] for index in (11, 0, 5, 5)
    ]
    assert target_objective(tmp_path / "mixed") == target_objective(parts[0])


def test_worker_processes_read_the_same_rows(targets: Path) -> None:
    loader = DataLoader(
        TargetDataset(targets), batch_size=4, num_workers=2, collate_fn=TargetCollator()
    )
    alone = DataLoader(TargetDataset(targets), batch_size=4, collate_fn=TargetCollator())
    for batch, wanted in zip(loader, alone, strict=True):
        assert torch.equal(batch["labels"], wanted["labels"])
        assert torch.equal(batch["targets"]["support_probs"], wanted["targets"]["support_probs"])


# The collator and the loss


def test_a_batch_says_which_tokens_are_supervised(targets: Path) -> None:
    examples = list(read_targets(targets))[:3]
    batch = TargetCollator()([TargetDataset(targets)[index] for index in range(3)])
    for row, example in enumerate(examples):
        wanted = np.full(batch["labels"].shape[1], -100)
        wanted[example.positions] = example.observed_ids
        assert batch["labels"][row].tolist() == wanted.tolist()


def test_rows_of_datasets_and_of_the_folder_are_one_batch(targets: Path, tmp_path: Path) -> None:
    rows = opened(targets, tmp_path)
    one, other = TargetCollator()([rows[3], rows[8]]), TargetDataset(targets)
    wanted = TargetCollator()([other[3], other[8]])
    assert one.keys() == wanted.keys()
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(one[name], wanted[name])
    for name, value in wanted["targets"].items():
        assert torch.equal(one["targets"][name], value)


def test_the_loss_is_that_of_the_reference(targets: Path) -> None:
    examples = list(read_targets(targets))[:5]
    batch = TargetCollator()([TargetDataset(targets)[index] for index in range(5)])
    torch.manual_seed(0)
    logits = torch.randn(*batch["input_ids"].shape, 320, dtype=torch.float64)
    ours = padded_batch(examples)
    losses = target_losses(logits[ours.rows, ours.columns], ours.targets, "student")
    wanted = (ours.targets.weights * losses).sum()
    objective = target_objective(targets)
    found = target_loss(logits, batch["targets"], objective)
    assert float(found) == pytest.approx(float(wanted / ours.tokens), rel=1e-12)
    assert float(target_loss(logits, batch["targets"], objective, 7)) == pytest.approx(
        float(wanted / 7), rel=1e-12
    )


# Trainers


def opened(folder: Path, cache: Path) -> Any:
    rows = datasets.load_dataset(
        "arrow",
        data_files=str(folder / "shard-*.arrow"),
        split="train",
        cache_dir=str(cache / "cache"),
    )
    return rows.with_transform(decoder(folder))


@pytest.fixture
def frozen(make_targets: Make, make_examples: Examples) -> Path:
    return make_targets(make_examples(8))


@pytest.fixture
def live(make_targets: Make, make_live_examples: Examples) -> Path:
    return make_targets(make_live_examples(8, "base-observed"), name="live", **LIVE)


def ours(targets: Path, model: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after three steps of our own trainer, each on all of the examples."""
    settings = TrainSettings(
        targets=targets,
        model=str(model),
        out=out,
        batch_size=8,
        max_steps=STEPS,
        epochs=STEPS,
        learning_rate=1e-3,
        schedule="constant",
        warmup_ratio=0.0,
        **options,
    )
    train(settings)
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


def arguments(kind: type, out: Path, **options: Any) -> Any:
    """The same steps for a trainer of others: two micro-batches of four make one."""
    same = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(**same | options)


def refuse_other_weights(found: dict[str, Any], wanted: dict[str, Any], start: Path) -> None:
    """The weights agree far more closely than three steps moved them."""
    first = AutoModelForCausalLM.from_pretrained(start).state_dict()
    moved = max(float((wanted[name] - first[name]).abs().max()) for name in wanted)
    apart = max(float((wanted[name] - found[name]).abs().max()) for name in wanted)
    assert moved > 2e-3
    assert apart < 2e-5


@pytest.mark.parametrize("folder", ["frozen", "live"])
def test_transformers_trainer_takes_the_same_steps(
    folder: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    targets = request.getfixturevalue(folder)
    student = AutoModelForCausalLM.from_pretrained(model)
    trainer = with_target_loss(Trainer, targets)(
        model=student,
        args=arguments(TrainingArguments, tmp_path / "theirs"),
        train_dataset=TargetDataset(targets),
        eval_dataset=TargetDataset(targets),
        data_collator=TargetCollator(),
    )
    trainer.train()
    batch = TargetCollator()([TargetDataset(targets)[index] for index in range(8)])
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = float(target_loss(logits, batch["targets"], target_objective(targets)).detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    refuse_other_weights(student.state_dict(), ours(targets, model, tmp_path / "run"), model)


def test_trl_takes_the_same_steps(frozen: Path, model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    student = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.pad_token = "w0"
    trainer = with_target_loss(trl.SFTTrainer, frozen)(
        model=student,
        processing_class=tokenizer,
        args=arguments(
            trl.SFTConfig, tmp_path / "theirs", dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=opened(frozen, tmp_path),
        data_collator=TargetCollator(),
    )
    trainer.train()
    refuse_other_weights(student.state_dict(), ours(frozen, model, tmp_path / "run"), model)


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_sft_on_any_folder_takes_the_same_steps(
    request: pytest.FixtureRequest, kind: str, model: Path, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    student = AutoModelForCausalLM.from_pretrained(model)
    with_target_loss(Trainer, folder, method="sft")(
        model=student,
        args=arguments(TrainingArguments, tmp_path / "theirs"),
        train_dataset=TargetDataset(folder),
        data_collator=TargetCollator(),
    ).train()
    wanted = ours(folder, model, tmp_path / "run", method="sft")
    refuse_other_weights(student.state_dict(), wanted, model)


def test_what_would_take_the_targets_away_is_refused(
    frozen: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="set remove_unused_columns=False"):
        with_target_loss(Trainer, frozen)(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=arguments(TrainingArguments, tmp_path, remove_unused_columns=True),
        )
    with pytest.raises(UserError, match="a row lacks positions"):
        TargetCollator()([{"id": "a", "input_ids": [1, 2]}])
    with pytest.raises(UserError, match=r"holds sft\+kl targets: .*build-targets --method gift"):
        with_target_loss(Trainer, frozen, method="gift")
