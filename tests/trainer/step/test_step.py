"""An optimizer step: its gradient however it is cut, and what stops it."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.loss.objective import objective_of
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.student import Student, load_student
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.step import NotFiniteError, Stepper, StepResult
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from ...support.runs import ANCHORED, LIVE, Examples, Make, read_log, weights


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
        padded_batch(examples[start : start + batch_size])
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
        ("accelerate.Accelerator.backward", "step 1: .*: give fewer --forward-tokens"),
        ("torch.optim.AdamW.step", "the optimizer: .*: give --optimizer adamw-8bit"),
        (
            "qpipe.trainer.models.student.Student.measure",
            "evaluation: .*: give fewer --forward-tokens",
        ),
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
