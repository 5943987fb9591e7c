"""Packed examples against each of them alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import Batch, packed_batch, padded_batch
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.packed_attention import can_pack
from qpipe.trainer.models.student import Student
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ...support.runs import Examples

SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "full": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "window of 3": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return MODELS[request.param]().double()


@pytest.fixture(params=[0, 1, 4])
def examples(request: pytest.FixtureRequest, make_examples: Examples) -> list[TargetExample]:
    """Seven examples that begin with so many tokens in common; none of these is supervised."""
    beginning = np.arange(10, 10 + request.param, dtype=np.int32)
    return [
        replace(
            each,
            input_ids=np.concatenate([beginning, each.input_ids]),
            positions=each.positions + np.int32(len(beginning)),
        )
        for each in make_examples(7)
    ]


def loss_and_gradients(
    student: Student, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    objective = Objective(choose("sft+kl"), "student", "base")
    student.zero_grad()
    total, _ = student(batch, objective)
    total.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return total.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_padded_batch(
    model: Any, examples: list[TargetExample], checkpointing: bool
) -> None:
    student = Student(model).train()
    padded = loss_and_gradients(student, padded_batch(examples))
    assert can_pack(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = loss_and_gradients(student, packed_batch(examples))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)  # norms are float32


def test_packed_examples_do_not_see_each_other(model: Any, examples: list[TargetExample]) -> None:
    """Another text in one of them moves its own logits, and not the least bit of the others'."""
    assert can_pack(model)
    student = Student(model).eval()
    batch = packed_batch(examples)
    shared = batch.segments[0]
    with torch.no_grad():
        before_NV = student.logits(batch)
        for number, changed in enumerate(examples):
            tokens = changed.input_ids.copy()
            tokens[shared:] = (tokens[shared:] + 1) % 200
            other = replace(changed, input_ids=tokens)
            changed_batch = packed_batch([*examples[:number], other, *examples[number + 1 :]])
            assert changed_batch.segments == batch.segments
            after_NV = student.logits(changed_batch)
            is_own_N = batch.targets.example_of == number
            assert (after_NV[is_own_N] - before_NV[is_own_N]).abs().max() > 1e-2
            assert torch.equal(after_NV[~is_own_N], before_NV[~is_own_N])


@pytest.mark.parametrize(
    "make",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=32, n_layer=2, n_head=4)),
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        lambda: DogeForCausalLM(
            DogeConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
    ],
    ids=["positions by distance in the row", "a state that goes on", "a mask of its own"],
)
def test_models_that_would_mix_examples_are_left_as_they_are(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    model = make()
    own = model.config._attn_implementation
    assert not can_pack(model)
    assert model.config._attn_implementation == own
