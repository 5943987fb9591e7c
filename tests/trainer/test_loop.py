"""Training from folder to folder, on tiny random models."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.collate import collate
from qpipe.trainer.loop import train
from qpipe.trainer.models import find_model
from qpipe.trainer.objective import objective_of
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step import NotFiniteError, Stepper, StepResult, start_accelerator
from qpipe.trainer.student import Student, load_student
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

Make = Callable[..., Path]
Examples = Callable[..., list[TargetExample]]


def folder_settings(method: str, form: str, residual: str, **parameters: float) -> dict[str, Any]:
    own = {"method": method, "form": form, "parameters": parameters}
    return own | {"residual": residual, "tail_shape": "student"}


ANCHORED = folder_settings("sft+kl", "frozen-target", "base", lam=0.1)
LIVE = {
    "dft": folder_settings("dft", "live", "observed"),
    "iw-sft": folder_settings("iw-sft", "live", "base-observed", T=1.0),
    "psft": folder_settings("psft", "live", "base-observed", eps_hi=0.28),
    "target-sft": folder_settings("target-sft", "live", "teacher", eta=0.5),
}


@pytest.fixture
def targets(make_targets: Make, make_examples: Examples) -> Path:
    """17 examples: two steps of eight, and a last one of one."""
    return make_targets(make_examples(17))


@pytest.fixture
def settings(targets: Path, model: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        targets=targets, model=str(model), out=tmp_path / "run", learning_rate=1e-3
    )


def read_log(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(left: Path, right: Path, **tolerance: float) -> None:
    torch.testing.assert_close(weights(left), weights(right), **tolerance)


# The optimizer step


def gradients_of_step(
    model: Path,
    examples: list[TargetExample],
    batch_size: int,
    folder: dict[str, Any] = ANCHORED,
    **given: Any,
) -> tuple[dict[str, torch.Tensor], StepResult, Student]:
    """The gradient that the optimizer is handed when a step's examples are cut into batches."""
    settings = TrainSettings(Path(), str(model), Path(), max_grad_norm=1e9, **given)
    student = load_student(find_model(str(model)), settings.gradient_checkpointing)
    objective = objective_of(folder, folder["method"])
    stepper = Stepper(start_accelerator(settings.precision), student, settings, objective)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()

    stepper.optimizer.optimizer.register_step_pre_hook(keep)
    batches = [
        collate(examples[start : start + batch_size])
        for start in range(0, len(examples), batch_size)
    ]
    result = stepper.step(1, batches, learning_rate=0.0)
    assert result.tokens == sum(len(example.positions) for example in examples)
    return found, result, student


def test_gradient_is_the_same_however_the_step_is_cut(model: Path, make_examples: Examples) -> None:
    """Examples of unequal length: a mean of means would not be the mean."""
    examples = make_examples(8)
    whole, step, _ = gradients_of_step(model, examples, batch_size=8)
    assert step.error_bound is None
    for batch_size in (1, 2, 3, 4):
        cut, cut_step, _ = gradients_of_step(model, examples, batch_size)
        assert cut_step.loss == pytest.approx(step.loss, rel=1e-6)
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", LIVE)
def test_gradient_of_a_live_target_is_the_same_however_the_step_is_cut(
    model: Path, make_live_examples: Examples, method: str
) -> None:
    """Also where a weight belongs to a whole example (iw-sft)."""
    folder = LIVE[method]
    examples = make_live_examples(8, folder["residual"])
    whole, step, _ = gradients_of_step(model, examples, 8, folder)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for batch_size in (1, 3):
        cut, cut_step, _ = gradients_of_step(model, examples, batch_size, folder)
        assert cut_step.loss == pytest.approx(step.loss, rel=1e-5)
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6 * largest)
        if method == "target-sft":
            assert step.error_bound is not None
            assert cut_step.error_bound == pytest.approx(step.error_bound, rel=1e-5)
        else:
            assert step.error_bound is cut_step.error_bound is None


def test_gradient_checkpointing_changes_nothing(model: Path, make_examples: Examples) -> None:
    examples = make_examples(4)
    plain, _, _ = gradients_of_step(model, examples, 2)
    recomputed, _, student = gradients_of_step(model, examples, 2, gradient_checkpointing=True)
    assert student.model.is_gradient_checkpointing
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eval_fraction", [0.0, 0.3])
def test_with_gradient_checkpointing_layers_are_computed_again(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, eval_fraction: float
) -> None:
    """Evaluated or not: a model is loaded for inference, where the option does nothing."""
    calls = Counter[str]()
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, *arguments: Any) -> torch.Tensor:
        calls["training" if self.training else "evaluation"] += 1
        return forward(self, *arguments)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    made = []
    for name, is_on in (("plain", False), ("again", True)):
        calls.clear()
        train(
            replace(
                settings,
                out=tmp_path / name,
                gradient_checkpointing=is_on,
                eval_fraction=eval_fraction,
            )
        )
        made.append(calls["training"])
    assert made[1] == 2 * made[0] > 0


def test_bfloat16_keeps_float32_weights_and_comes_close(
    model: Path, make_examples: Examples
) -> None:
    examples = make_examples(4)
    _, exact, _ = gradients_of_step(model, examples, 2)
    found, result, student = gradients_of_step(model, examples, 2, precision="bfloat16")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert result.loss != exact.loss
    assert result.loss == pytest.approx(exact.loss, rel=1e-2)


def test_sft_is_training_on_the_dense_cross_entropy(
    model: Path, settings: TrainSettings, make_examples: Examples
) -> None:
    """Three steps of `--method sft` on a soft folder, against a loop in plain torch."""
    examples = make_examples(17)
    given = {"batch_size": 17, "epochs": 3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    train(replace(settings, method="sft", schedule="linear", **given))
    reference = AutoModelForCausalLM.from_pretrained(model)
    groups = [
        {
            "params": [p for name, p in reference.named_parameters() if is_spared(name) == spares],
            "weight_decay": 0.0 if spares else 0.1,
        }
        for spares in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups)
    steps = read_log(settings.out, "step")
    for step, learning_rate in zip(steps, [1e-3, 2e-3 / 3, 1e-3 / 3], strict=True):
        loss = dense_cross_entropy(reference, examples)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    # Adam divides each gradient by its size: where it is nearly 0, its rounding is seen
    torch.testing.assert_close(weights(settings.out), reference.state_dict(), rtol=0, atol=1e-4)


def is_spared(name: str) -> bool:
    return "norm" in name or "embed_tokens" in name


def dense_cross_entropy(model: torch.nn.Module, examples: list[TargetExample]) -> torch.Tensor:
    """The mean over the supervised tokens, one example at a time, labels shifted by one."""
    total, tokens = torch.tensor(0.0), 0
    for example in examples:
        labels = torch.full((len(example.input_ids),), -100)
        labels[example.positions] = torch.tensor(example.observed_ids).long()
        logits_TV = model(torch.tensor(example.input_ids)[None].long()).logits[0]
        total = total + cross_entropy(logits_TV[:-1], labels[1:], reduction="sum")
        tokens += len(example.positions)
    return total / tokens


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("accelerate.Accelerator.prepare", "the model: .*: give --lora-rank"),
        ("qpipe.trainer.step.Stepper._backward", "step 1: .*: give fewer --forward-tokens"),
        ("torch.optim.AdamW.step", "the optimizer: .*: give --optimizer adamw-8bit"),
        ("qpipe.trainer.student.Student.measure", "evaluation: .*: give fewer --forward-tokens"),
    ],
)
def test_a_device_without_room_is_one_line_wherever_it_shows(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(place, full)
    with pytest.raises(UserError, match=words.replace(".*", "the device is out of memory")):
        train(replace(settings, eval_fraction=0.3))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_model_is_refused(settings: TrainSettings, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(settings.model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model quantised: (cannot be loaded|its weights)"):
        train(replace(settings, model=str(folder)))


def test_few_of_many_examples_that_are_not_finite_are_named() -> None:
    error = NotFiniteError(3, math.inf, [f"chats.jsonl:{number}" for number in range(1, 2001)])
    assert "chats.jsonl:5 and 1,995 more: look at them" in str(error)
    assert "chats.jsonl:6" not in str(error)
    assert len(error.record["examples"]) == 2000
    assert "on examples a: look" in str(NotFiniteError(3, math.inf, ["a"]))


def test_a_loss_that_is_not_finite_stops_the_run(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    examples = make_examples(3)
    bad = replace(examples[1], weights=examples[1].weights * float("inf"))
    folder = make_targets([examples[0], bad, examples[2]], "bad")
    with pytest.raises(UserError, match=r"^step \d: the loss \(inf\) .* example-1: ") as caught:
        train(replace(settings, targets=folder, batch_size=1))
    assert "example-0" not in str(caught.value)
    names = {path.name for path in settings.out.iterdir()}
    assert names == {"plan.json", "log.jsonl", "not-finite.json"}
    record = json.loads((settings.out / "not-finite.json").read_text())
    assert record["examples"] == ["example-1"]
    assert record["what"] == "loss (inf)"


# The run


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

    monkeypatch.setattr("qpipe.trainer.loop.load_student", load_and_keep)
    train(settings)
    batch = collate(make_examples(3))
    reloaded = Student(AutoModelForCausalLM.from_pretrained(settings.out))
    with torch.no_grad():
        assert torch.equal(reloaded.eval().logits(batch), kept[0].eval().logits(batch))


def test_a_finished_run_that_lost_its_model_is_not_called_done(settings: TrainSettings) -> None:
    train(settings)
    (settings.out / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
        train(settings)


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


def test_record_of_a_run(settings: TrainSettings, targets: Path) -> None:
    result = train(settings)
    record = json.loads((settings.out / "qpipe.json").read_text())
    manifest = json.loads((targets / "manifest.json").read_text())
    assert record["parents"]["targets"] == {
        name: manifest[name] for name in ("identity", "fingerprint", "parents")
    }
    assert record["identity"]["inputs"]["targets"] == manifest["fingerprint"]
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["settings"]["method"] == "sft+kl"
    assert record["results"] == asdict(result)
    assert not (settings.out / "plan.json").exists()
    assert not list(settings.out.glob(".*"))


# The output folder


def test_a_finished_run_is_not_repeated(settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(settings, eval_fraction=0.2)
    first = train(settings)
    before = {path: path.stat().st_mtime_ns for path in settings.out.iterdir()}
    # the same gradients and the same content elsewhere are the same run
    moved = settings.targets.rename(tmp_path / "moved")
    again = train(replace(settings, targets=moved, forward_tokens=24, epochs=1))
    assert again == replace(first, was_done=True)
    assert {path: path.stat().st_mtime_ns for path in settings.out.iterdir()} == before


def test_a_run_killed_at_its_very_end_is_finished(settings: TrainSettings) -> None:
    """Between the writing of the record and the removal of the plan."""
    train(settings)
    (settings.out / "plan.json").write_text("{}")
    assert train(settings).was_done
    assert not (settings.out / "plan.json").exists()


def test_another_run_in_the_folder_is_refused(settings: TrainSettings) -> None:
    train(settings)
    with pytest.raises(UserError, match=r"settings.learning_rate is 0.001 there and 0.002 now"):
        train(replace(settings, learning_rate=0.002))
    with pytest.raises(UserError, match=r'settings.method is "sft\+kl" there and "sft" now'):
        train(replace(settings, method="sft"))
    with pytest.raises(UserError, match=r"settings.batch_size is 8 there and 4 now"):
        train(replace(settings, batch_size=4))


def test_a_folder_with_something_else_is_refused(settings: TrainSettings) -> None:
    settings.out.mkdir()
    (settings.out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        train(settings)
    assert [path.name for path in settings.out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("stage", ["loop.save_model", "loop.finish", "run.Stepper"])
def test_a_run_interrupted_before_a_checkpoint_starts_over(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"qpipe.trainer.{stage}", killed)
        with pytest.raises(Killed):
            train(settings)
    assert not (settings.out / "qpipe.json").exists()
    half_saved = settings.out / ".model.tmp" / "left-by-the-killed-run.json"
    half_saved.parent.mkdir()
    half_saved.write_text("{")
    assert not train(settings).was_done
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    assert_same_weights(settings.out, undisturbed.out, rtol=0, atol=0)
    assert {path.name for path in settings.out.iterdir()} == {
        path.name for path in undisturbed.out.iterdir()
    }


# What is refused


def test_targets_of_another_tokenizer(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    folder = make_targets(make_examples(2), "other", tokenizer_hash="f" * 64)
    ours = find_model(settings.model).tokenizer_hash
    with pytest.raises(UserError, match=rf"tokenizer hash f{{64}}, model \S+ has {ours}: "):
        train(replace(settings, targets=folder))
    assert not settings.out.exists()


def test_targets_of_another_vocabulary(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    folder = make_targets(make_examples(2), "other", vocab_size=256)
    with pytest.raises(UserError, match=r"vocab size 256, model \S+ has 200: "):
        train(replace(settings, targets=folder))


def test_unsealed_targets(settings: TrainSettings) -> None:
    (settings.targets / "manifest.json").rename(settings.targets / "manifest.bak")
    with pytest.raises(UserError, match=r"not a qpipe folder, it has no manifest\.json"):
        train(settings)


def test_a_method_that_the_folder_does_not_hold(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match=r"holds sft\+kl targets: .*build-targets --method gift"):
        train(replace(settings, method="gift"))


def test_nothing_to_train_on(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    with pytest.raises(UserError, match="has no supervised token to train on"):
        train(replace(settings, targets=make_targets([], "empty")))
    one = make_targets(make_examples(1), "one")
    with pytest.raises(UserError, match="holds out all of the 1 examples"):
        train(replace(settings, targets=one, eval_fraction=0.999))
    with pytest.raises(UserError, match="holds out none of the 1 examples"):
        train(replace(settings, targets=one, eval_fraction=0.001))
    assert not settings.out.exists()


def test_a_model_without_weights(settings: TrainSettings, make_model: Make) -> None:
    base = make_model()
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        train(replace(settings, model=str(base)))


def test_float16_needs_a_gpu(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--precision float16 needs a GPU"):
        train(replace(settings, precision="float16"))


# Several processes

_LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
_SCRIPT = """
import sys
from pathlib import Path
from qpipe.trainer.loop import train
from qpipe.trainer.settings import TrainSettings
targets, model, out = sys.argv[1:]
train(TrainSettings(Path(targets), model, Path(out), learning_rate=1e-3, eval_fraction=0.3,
                    batch_size=8, forward_tokens=30))
"""


def test_two_processes_train_as_one(
    settings: TrainSettings, make_targets: Make, make_examples: Examples, tmp_path: Path
) -> None:
    folder = make_targets(make_examples(13), "few")
    assert_two_processes_train_as_one(replace(settings, targets=folder), tmp_path)


def test_two_processes_train_as_one_on_a_live_target(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples, tmp_path: Path
) -> None:
    """The bound, too, is that of all processes."""
    folder = make_targets(make_live_examples(13, "teacher"), "few", **LIVE["target-sft"])
    assert_two_processes_train_as_one(replace(settings, targets=folder), tmp_path)
    assert all(line["error_bound"] > 0 for line in read_log(settings.out, "step"))


def assert_two_processes_train_as_one(settings: TrainSettings, tmp_path: Path) -> None:
    """Nine examples to train on in steps of eight: the second process has none for the last."""
    settings = replace(settings, eval_fraction=0.3)
    two = replace(settings, out=tmp_path / "two")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [*_LAUNCH, str(script), str(two.targets), two.model, str(two.out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = train(settings)
    assert (result.steps, result.examples) == (2, 9)
    for event in ("step", "evaluation"):
        for ours, theirs in zip(
            read_log(settings.out, event), read_log(two.out, event), strict=True
        ):
            for name in ours.keys() - {"event", "tokens_per_second", "seconds_waited_in_all"}:
                if ours[name] is None:
                    assert theirs[name] is None
                else:
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    # Adam divides each gradient by its size: where it is nearly 0, its rounding is seen
    assert_same_weights(two.out, settings.out, rtol=0, atol=1e-4)
    # the same examples a step: the same run, which is done
    assert train(two).was_done
