"""Two processes that share the weights train as one that has them all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.run.checkpoint import checkpoints_in
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ...support.runs import Examples, Make, read_log
from ...support.torchrun import train_in_two_processes


@pytest.fixture
def settings(
    settings: TrainSettings, make_targets: Make, make_examples: Examples, make_model: Make
) -> TrainSettings:
    """Five steps, of a head that is the embeddings, in an odd vocabulary."""
    return replace(
        settings,
        targets=make_targets(make_examples(21), "more"),
        model=str(make_model(tie_word_embeddings=True)),
        weight_decay=0.1,
        max_grad_norm=0.5,
        batch_size=4,
        forward_tokens=20,
        eval_fraction=0.2,
        eval_every=2,
        save_every=2,
    )


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    # Adam divides each gradient by its size: where it is nearly 0, its rounding is seen
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for line, expected in zip(log(one), log(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def log(folder: Path) -> list[dict[str, Any]]:
    left_out = ("event", "tokens_per_second", "seconds_waited_in_all", "error_bound")
    return [{k: v for k, v in line.items() if k not in left_out} for line in read_log(folder)]


@pytest.mark.slow
def test_two_processes_with_shared_weights_train_as_one(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """Also where it is killed, goes on sharded, is killed again and goes on as one process."""
    fsdp = replace(settings, fsdp=True)
    two, killed = replace(fsdp, out=tmp_path / "two"), replace(fsdp, out=tmp_path / "killed")
    lora = replace(settings, lora_rank=2, learning_rate=1e-2)
    lora_two = replace(lora, fsdp=True, out=tmp_path / "lora-two")
    train_in_two_processes((two, None), (killed, 3), (killed, 4), (lora_two, None))
    result = train(settings)
    assert result.steps == 4
    assert_same_run(two.out, settings.out)
    assert any(line.get("grad_norm", 0) > 0.5 for line in log(two.out))  # it was clipped
    AutoModelForCausalLM.from_pretrained(two.out)
    assert [path.name for path in checkpoints_in(killed.out)] == ["step-00000002"]
    train(replace(killed, fsdp=False))
    assert_same_run(killed.out, settings.out)
    lora_one = replace(lora, out=tmp_path / "lora-one")
    train(lora_one)
    assert_same_run(lora_two.out, lora_one.out)


def test_one_process_has_nothing_to_share(settings: TrainSettings, tmp_path: Path) -> None:
    train(replace(settings, fsdp=True))
    plain = replace(settings, out=tmp_path / "plain")
    train(plain)
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (settings, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_cannot_be_shared(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match="--fsdp: the moments of --optimizer adamw-8bit cannot"):
        replace(settings, fsdp=True, optimizer="adamw-8bit")
    with pytest.raises(UserError, match="--fsdp has no loss scaling for --precision float16"):
        replace(settings, fsdp=True, precision="float16")
