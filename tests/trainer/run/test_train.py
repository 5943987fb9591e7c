"""Training from folder to folder, on tiny random models."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.heads import HeadForm
from qpipe.trainer.models.student import Student, load_student
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...support.runs import LIVE, Examples, Make, assert_same_weights, read_log, weights


def test_training_lowers_the_held_out_loss(
    settings: TrainSettings, make_targets: Make, make_examples: Examples, tmp_path: Path
) -> None:
    folder = make_targets(make_examples(200), "many", rows=40)
    result = train(replace(settings, targets=folder, epochs=5, eval_fraction=0.2, eval_every=50))
    assert result.before is not None
    assert result.after is not None
    assert result.after.target_loss < 0.9 * result.before.target_loss
    assert result.after.nll < 0.8 * result.before.nll
    evaluations = read_log(settings.out, "evaluation")
    assert [line["step"] for line in evaluations] == [0, 50, result.steps]
    assert evaluations[0]["target_loss"] == result.before.target_loss
    assert evaluations[-1] == {"event": "evaluation", "step": result.steps, **asdict(result.after)}


def test_saved_model_is_the_evaluated_one(
    make_model: Make, make_targets: Make, make_examples: Examples, tmp_path: Path
) -> None:
    """Also where the base is in bfloat16: the evaluation after is of the rounded weights."""
    base = make_model(torch.bfloat16)
    (base / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    settings = TrainSettings(
        targets=make_targets(make_examples(40)),
        model=str(base),
        out=tmp_path / "run",
        learning_rate=1e-3,
        eval_fraction=0.5,
    )
    result = train(settings)
    saved = AutoModelForCausalLM.from_pretrained(settings.out)
    assert saved.dtype == torch.bfloat16
    assert find_model(str(settings.out)).tokenizer_hash == find_model(str(base)).tokenizer_hash
    assert AutoTokenizer.from_pretrained(settings.out).decode([3, 4]) == "w3 w4"
    generation = "generation_config.json"
    assert (settings.out / generation).read_bytes() == (base / generation).read_bytes()
    again = train(replace(settings, model=str(settings.out), out=tmp_path / "again", max_steps=1))
    assert result.after == again.before
    assert result.after != result.before


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_trains_linear_layers_and_saves_a_plain_model(
    settings: TrainSettings, model: Path, gradient_checkpointing: bool
) -> None:
    lora = replace(settings, lora_rank=4, gradient_checkpointing=gradient_checkpointing)
    result = train(replace(lora, epochs=10, learning_rate=1e-2, eval_fraction=0.3))
    assert result.before is not None
    assert result.after is not None
    assert result.after.target_loss < result.before.target_loss
    base, trained = weights(model), weights(settings.out)
    assert base.keys() == trained.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {name for name in base if "_proj" in name}
    for name in changed:
        assert torch.linalg.matrix_rank(trained[name] - base[name], rtol=1e-3) <= 4


def test_reloaded_logits_are_identical(
    settings: TrainSettings, make_examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Student] = []

    def load_and_keep(*arguments: Any) -> Student:
        kept.append(load_student(*arguments))
        return kept[0]

    monkeypatch.setattr("qpipe.trainer.run.train.load_student", load_and_keep)
    train(settings)
    batch = padded_batch(make_examples(3))
    reloaded = Student(AutoModelForCausalLM.from_pretrained(settings.out))
    with torch.no_grad():
        assert torch.equal(reloaded.eval().logits(batch), kept[0].eval().logits(batch))


def test_a_model_whose_head_was_not_that_of_the_loss_is_not_saved(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with_a_cap(*arguments: Any) -> Student:
        student = load_student(*arguments)
        student.head_form = HeadForm(softcap=30.0)
        return student

    monkeypatch.setattr("qpipe.trainer.run.train.load_student", load_with_a_cap)
    with pytest.raises(UserError, match="are not those of the output head that the fused loss use"):
        train(settings)
    assert not (settings.out / "config.json").exists()


def test_same_seed_same_model(settings: TrainSettings, make_model: Make, tmp_path: Path) -> None:
    base = make_model(attention_dropout=0.2)
    runs = [
        replace(settings, model=str(base), out=tmp_path / name, seed=seed)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    ]
    for run in runs:
        train(run)
    assert_same_weights(runs[0].out, runs[1].out, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(runs[0].out, runs[2].out)


def test_log_of_a_run(settings: TrainSettings, make_examples: Examples) -> None:
    result = train(replace(settings, epochs=2, schedule="linear", warmup_ratio=0.2))
    steps = read_log(settings.out, "step")
    # two epochs of 17 in eights: 8, 8, 8, 8 and 2
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    rates = [line["learning_rate"] for line in steps]
    assert rates == pytest.approx([0.0005, 0.001, 0.00075, 0.0005, 0.00025])
    tokens = sum(len(example.positions) for example in make_examples(17))
    assert sum(line["tokens"] for line in steps) == result.tokens == 2 * tokens
    assert (result.steps, result.examples) == (5, 34)
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in steps)


def test_log_of_a_live_run_whose_teacher_is_truncated(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples
) -> None:
    """The bound of the first step is 2·(1 − p_y)·m̂, worked out position by position."""
    examples = make_live_examples(17, "teacher")
    folder = make_targets(examples, "live", **LIVE["target-sft"])
    train(replace(settings, targets=folder, batch_size=17, epochs=3, eval_fraction=0.0))
    steps = read_log(settings.out, "step")
    assert len(steps) == 3
    assert all(math.isfinite(line["error_bound"]) for line in steps)
    assert steps[0]["error_bound"] == pytest.approx(mean_bound(settings.model, examples), rel=1e-5)
    assert steps[2]["error_bound"] != steps[0]["error_bound"]
    record = json.loads((settings.out / "qpipe.json").read_text())
    assert record["settings"]["method"] == "target-sft"


def mean_bound(model: str, examples: list[TargetExample]) -> float:
    """Of target-sft with η = 0.5, over all supervised tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    bounds: list[float] = []
    for example in examples:
        with torch.no_grad():
            logits_TV = loaded(torch.tensor(example.input_ids)[None].long()).logits[0].double()
        ends = np.cumsum(example.counts)
        for n, position in enumerate(example.positions):
            entries = slice(ends[n] - example.counts[n], ends[n])
            ids, q = example.support_ids[entries], example.support_probs[entries]
            p = logits_TV[position - 1].softmax(0).numpy()
            inside = np.sqrt(p[ids] * q).sum()
            tail = np.sqrt(np.delete(p, ids).sum() * example.tail_mass[n])
            p_y = p[example.input_ids[position]]
            bounds.append(2 * (1 - p_y) * tail / (inside + tail))
    return float(np.mean(bounds))


@pytest.mark.parametrize("method", ["dft", "iw-sft", "psft"])
def test_log_of_a_live_run_that_needs_no_distribution(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples, method: str
) -> None:
    examples = make_live_examples(40, LIVE[method]["residual"])
    folder = make_targets(examples, "live", **LIVE[method])
    result = train(replace(settings, targets=folder, epochs=2, eval_fraction=0.3))
    steps = read_log(settings.out, "step")
    assert len(steps) == result.steps > 3
    assert all(line["error_bound"] is None for line in steps)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert all(line["kl_to_base"] is None for line in read_log(settings.out, "evaluation"))


def test_sft_on_a_live_folder_is_sft(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples, tmp_path: Path
) -> None:
    """Whatever a folder holds, `--method sft` gives one model."""
    runs = []
    for name in ("dft", "target-sft"):
        examples = make_live_examples(17, LIVE[name]["residual"])
        folder = make_targets(examples, f"targets-{name}", **LIVE[name])
        runs.append(replace(settings, targets=folder, out=tmp_path / name, method="sft"))
        train(runs[-1])
        assert all(line["error_bound"] is None for line in read_log(runs[-1].out, "step"))
    assert_same_weights(runs[0].out, runs[1].out, rtol=0, atol=1e-5)


def test_weights_of_tokens_count_in_a_folder_made_for_sft(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples, tmp_path: Path
) -> None:
    """--method sft leaves out another method's; sft has none but those of the demonstrations."""
    examples = make_live_examples(17, "observed")
    halved = [
        replace(each, weights=np.where(each.positions % 2, 0, 1).astype(np.float32))
        for each in examples
    ]
    own = LIVE["dft"] | {"method": "sft", "form": "frozen-target"}
    losses = {}
    for name, rows, of_folder in (("all", examples, own), ("half", halved, own)):
        folder = make_targets(rows, name, **of_folder)
        for method in (None, "sft"):
            out = tmp_path / f"{name}-{method}"
            train(replace(settings, targets=folder, out=out, method=method))
            losses[name, method] = read_log(out, "step")[0]["loss"]
    assert losses["half", None] < 0.9 * losses["all", None]
    assert losses["half", "sft"] == losses["half", None]
    other = make_targets(halved, "dft", **LIVE["dft"])
    train(replace(settings, targets=other, out=tmp_path / "other", method="sft"))
    assert read_log(tmp_path / "other", "step")[0]["loss"] == losses["all", None]


def test_targets_of_weight_0_alone_are_not_trained(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    """As qpipe 0.1 stored them; a single token of another weight is trained."""
    nothing = [replace(each, weights=0 * each.weights) for each in make_examples(9)]
    given = replace(settings, targets=make_targets(nothing, "nothing"), batch_size=4)
    with pytest.raises(UserError, match=r"nothing was trained: .* every token .* has the weight 0"):
        train(given)
    assert not (settings.out / "config.json").exists()
    nothing[-1].weights[-1] = 1
    one = replace(given, targets=make_targets(nothing, "one"), out=settings.out.with_name("learns"))
    assert train(one).steps == 3


def test_record_of_a_run(settings: TrainSettings) -> None:
    result = train(settings)
    record = json.loads((settings.out / "qpipe.json").read_text())
    manifest = json.loads((settings.targets / "manifest.json").read_text())
    assert record["parents"]["targets"] == {
        name: manifest[name] for name in ("identity", "fingerprint", "parents")
    }
    assert record["identity"]["inputs"]["targets"] == manifest["fingerprint"]
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["settings"]["method"] == "sft+kl"
    assert record["results"] == asdict(result)
    assert not (settings.out / "plan.json").exists()
    assert not list(settings.out.glob(".*"))
