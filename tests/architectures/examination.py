"""What qpipe makes of one architecture, compared with what it should."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.data.batch import packed_batch, padded_batch
from qpipe.trainer.models.adapters import Adapters
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.files import ModelFiles
from qpipe.trainer.models.heads import causal_model, logit_chunks
from qpipe.trainer.models.saving import save_model
from qpipe.trainer.models.student import Student, load_student
from transformers import AutoModelForCausalLM

from .reference import (
    Examples,
    largest_error,
    logits_alone,
    make_examples,
    own_gradients,
    reference_gradients,
)
from .zoo import VOCAB_SIZE, in_folder, tiny_model

_LOG_PROB, _GRADIENT, _LOSS = 5e-5, 2e-5, 1e-5  # float32; gradients as shares of the largest


@dataclass(frozen=True, slots=True)
class Findings:
    """What an architecture supports; `refused` is the reason why it is not trained."""

    architecture: str
    packed: bool = False
    fused: bool = False
    refused: str | None = None


def examine(model_type: str, folder: Path) -> Findings:
    """Score, train and save a tiny model of an architecture; asserts that all is as it should."""
    own = tiny_model(model_type)
    base, examples = in_folder(own, folder / "base"), make_examples(VOCAB_SIZE)
    name = type(own).__name__
    if _is_not_causal(own, examples):
        with pytest.raises(UserError, match=r"not a causal|other logits") as caught:
            load_student(base, gradient_checkpointing=False)
        return Findings(name, refused=str(caught.value))
    student = load_student(base, gradient_checkpointing=False).eval()
    _check_scores(own, student, examples)
    loss, expected = reference_gradients(own, examples)
    found_loss, found = own_gradients(student, padded_batch(examples))
    assert abs(found_loss - loss) < _LOSS * loss
    assert largest_error(found, expected) < _GRADIENT
    packed = can_pack(student.model)
    if packed:
        found_loss, found = own_gradients(student, packed_batch(examples))
        assert abs(found_loss - loss) < _LOSS * loss
        assert largest_error(found, expected) < _GRADIENT
    _check_saved(own, student, base, folder / "saved")
    _check_adapters(base, examples, folder / "merged")
    return Findings(name, packed, student.head_form is not None)


@torch.no_grad()
def _is_not_causal(model: Any, examples: Examples) -> bool:
    """Whether the last tokens of the longest example, or their number, change earlier logits."""
    tokens = torch.from_numpy(max((each.input_ids for each in examples), key=len)).long()[None]
    kept = tokens.shape[1] // 2
    one, two = (
        model(input_ids=each, use_cache=False).logits for each in (tokens, tokens[:, :kept])
    )
    return not torch.allclose(one[:, :kept], two, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _check_scores(own: Any, student: Student, examples: Examples) -> None:
    """Log-probabilities, padded, as in scoring and with a mask, against each example by itself."""
    batch = padded_batch(examples)
    alone = torch.cat([logits_alone(own, each) for each in examples])
    for inputs in ({"input_ids": batch.inputs["input_ids"]}, batch.inputs):
        places = inputs, batch.rows, batch.columns
        parts = [logits for _, logits in logit_chunks(student.model, student.head_form, *places)]
        error = (torch.cat(parts).log_softmax(-1) - alone.double().log_softmax(-1)).abs().max()
        assert error < _LOG_PROB


def _check_saved(own: Any, student: Student, base: ModelFiles, folder: Path) -> None:
    save_model(student, base, folder, is_main=True)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(saved.state_dict(), own.state_dict(), rtol=0, atol=0)


def _check_adapters(base: ModelFiles, examples: Examples, folder: Path) -> None:
    """Adapters learn, and the merged model is the adapted one."""
    student = load_student(base, gradient_checkpointing=False, adapters=Adapters(2)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    _, found = own_gradients(student, padded_batch(examples))
    assert all("lora_" in name for name in found)
    # all take part; but those that choose keys alone get no gradient while all keys are chosen
    assert sum(float(each.abs().max()) > 0 for each in found.values()) > len(found) / 2
    save_model(student, base, folder, is_main=True)
    merged = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=causal_model(student.model).config._attn_implementation
    )
    with torch.no_grad():
        for each in examples:
            found_logits, logits = (logits_alone(m, each) for m in (student.model, merged.eval()))
            torch.testing.assert_close(found_logits, logits, rtol=1e-3, atol=1e-3)
