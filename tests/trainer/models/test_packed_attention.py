"""Packed examples against each of them alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import Batch, packed_batch, padded_batch
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.files import ModelFiles, load_model
from qpipe.trainer.models.student import Student
from transformers import (
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

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
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE,
            head_dim=8,
            sliding_window=3,
            attn_logit_softcapping=1.0,
            attn_implementation="eager",
        )
    ),
    "window of 3": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    model = MODELS[request.param]()
    # the eager attention of transformers takes its softmax in float32: its masks overflow there
    return model if request.param == "capped" else model.double()


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
    rtol = 1e-5 if model.dtype == torch.float64 else 1e-3  # norms are float32
    torch.testing.assert_close(packed, padded, rtol=rtol, atol=rtol / 10)


def test_packed_examples_do_not_see_each_other(model: Any, examples: list[TargetExample]) -> None:
    """Another text in one of them moves its own logits, and not the least bit of the others'."""
    assert can_pack(model)
    student = Student(model).eval()
    batch = packed_batch(examples)
    shared = batch.segments.lengths[0]
    with torch.no_grad():
        before_NV = student.logits(batch)
        for number, changed in enumerate(examples):
            tokens = changed.input_ids.copy()
            tokens[shared:] = (tokens[shared:] + 1) % 200
            other = replace(changed, input_ids=tokens)
            changed_batch = packed_batch([*examples[:number], other, *examples[number + 1 :]])
            assert changed_batch.segments.lengths == batch.segments.lengths
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
        lambda: PhimoeForCausalLM(
            PhimoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=40)
        ),
    ],
    ids=[
        "positions by distance in the row",
        "a state that goes on",
        "a mask of its own",
        "a window longer than the trial, by the mask alone",
    ],
)
def test_models_that_would_mix_examples_are_left_as_they_are(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    model = make()
    own = model.config._attn_implementation
    assert not can_pack(model)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_as_they_were_after_the_trial(name: str) -> None:
    model = MODELS[name]()

    def windows() -> list[Any]:
        holders = [model.config, *model.modules()]
        return [getattr(holder, "sliding_window", None) for holder in holders]

    before = windows()
    assert can_pack(model)
    assert windows() == before


def test_attention_that_caps_its_scores_is_computed_as_it_is(tmp_path: Path) -> None:
    """sdpa, the default, leaves the cap out."""
    torch.manual_seed(1)
    model = MODELS["capped"]()
    input_ids = torch.arange(1, 9)[None]
    capped = model(input_ids).logits
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(input_ids).logits, capped, atol=1e-3)
    model.save_pretrained(tmp_path)
    tokenizer: Any = None
    files = ModelFiles("capped", None, tmp_path, AutoConfig.from_pretrained(tmp_path), tokenizer)
    torch.testing.assert_close(load_model(files, torch.float32)(input_ids).logits, capped)
