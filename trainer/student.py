"""The model that is trained: loading it, its logits where they count, saving it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline.errors import UserError
from .collate import Batch, SparseTargets
from .fused import fused_loss, rows_of
from .heads import hidden_states, logit_chunks, logits_of, recognise
from .models import ModelFiles, load_model
from .objective import Objective


class Student(torch.nn.Module):
    """A causal language model with its loss, which runs on supervised tokens only.

    The loss is computed inside of what accelerate wraps: there the logits, if any, are [N, V] and
    not [B, T, V], and the head's weights are whole where they are sharded outside.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head_form = recognise(model)

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
        """Σ weight·loss of a batch, and the bounds of `Loss`."""
        if self.head_form is None:
            loss = objective(self.logits(batch), batch.targets)
        else:
            head = self.head_form.head(self.model)
            loss = fused_loss(self._hidden(batch), head, batch.targets, objective)
        return loss.sum, loss.error_bounds

    def logits(self, batch: Batch) -> Tensor:
        """The logits that predict each supervised token of a batch, [N, V]."""
        return logits_of(self.model, batch.inputs, batch.rows, batch.columns)

    def logit_chunks(self, batch: Batch) -> Iterator[tuple[Tensor, SparseTargets]]:
        """The logits a few positions at a time, each with its targets."""
        places = batch.inputs, batch.rows, batch.columns
        for rows, logits_nV in logit_chunks(self.model, self.head_form, *places):
            yield logits_nV, rows_of(batch.targets, rows)

    def _hidden(self, batch: Batch) -> Tensor:
        """The states that go into the head at the supervised positions, [N, D]."""
        return hidden_states(self.model, **batch.inputs)[batch.rows, batch.columns]

    def finish(self, dtype: torch.dtype) -> None:
        """Make the weights what they will be when saved in `dtype`, adapters merged into them."""
        if hasattr(self.model, "merge_and_unload"):
            self.model = self.model.merge_and_unload()
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def load_student(
    base: ModelFiles, gradient_checkpointing: bool, lora_rank: int | None = None
) -> Student:
    """The model with float32 weights; with `lora_rank`, only adapters of that rank learn."""
    model = load_model(base, torch.float32)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # or frozen embeddings would cut the graph
    return Student(model if lora_rank is None else _with_adapters(model, lora_rank))


def _with_adapters(model: Any, rank: int) -> Any:
    """LoRA (arXiv 2106.09685) on every linear layer but the head, with alpha twice the rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora-rank needs peft: pip install 'qpipe[lora]'") from error
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )


def saved_dtype(base: ModelFiles) -> torch.dtype:
    """The type in which the base's weights came, and the student's will be saved."""
    return base.config.dtype or torch.float32


def save_student(student: Student, base: ModelFiles, folder: Path) -> None:
    """Put the model and the base's tokenizer into a folder that transformers and vLLM load.

    All is written aside first; `config.json`, without which nothing loads a model, comes last.
    """
    from transformers import GenerationConfig

    aside = folder / ".model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    generation = base.folder / "generation_config.json"
    if generation.exists():
        # the base's own, as it is: saving one refuses settings that loading one accepts
        student.model.generation_config = GenerationConfig()
    student.model.to(saved_dtype(base)).save_pretrained(aside)
    base.tokenizer.save_pretrained(aside)
    if generation.exists():
        shutil.copyfile(generation, aside / generation.name)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_file():
            _sync(path)
        os.replace(path, folder / path.name)
    aside.rmdir()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
