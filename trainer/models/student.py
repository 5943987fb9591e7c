"""The model that is trained: loading, its loss, its logits at supervised positions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...pipeline.errors import UserError
from ..data.batch import Batch, SparseTargets
from ..loss.fused import fused_loss, rows_of
from ..loss.objective import Objective
from .adapters import Adapters, with_adapters
from .causality import check_causal
from .files import ModelFiles, load_reported
from .heads import hidden_states, logit_chunks, logits_of, recognise
from .parts import freeze_other_parts, lost_tensors


class Student(torch.nn.Module):
    """A causal language model with its loss, which runs on supervised tokens only.

    The loss is computed inside the module that accelerate wraps: the logits, if any, are [N, V] and
    not [B, T, V], and sharded weights of the head are gathered there.
    """

    def __init__(self, model: Any, lost_tensors: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.lost_tensors = lost_tensors  # of the checkpoint, which are not saved
        self.head_form = recognise(model)

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
        """Σ weight·loss of a batch, and the bounds of `Loss`."""
        if self.head_form is None:
            loss = objective(self.logits(batch), batch.targets)
        else:
            head = self.head_form.head(self.model)
            hidden_ND = hidden_states(self.model, **batch.inputs)[batch.rows, batch.columns]
            loss = fused_loss(hidden_ND, head, batch.targets, objective)
        return loss.sum, loss.error_bounds

    def measure(
        self,
        batch: Batch,
        read: Callable[[Tensor, SparseTargets], Tensor],
        whole_examples: bool = False,
    ) -> Tensor:
        """The sum of `read(logits, targets)` over chunks of positions.

        All positions are one chunk with `whole_examples`, or if the head is not recognised.
        """
        form = None if whole_examples else self.head_form
        parts = logit_chunks(self.model, form, batch.inputs, batch.rows, batch.columns)
        total, *others = (read(logits, rows_of(batch.targets, rows)) for rows, logits in parts)
        return sum(others, total)

    def logits(self, batch: Batch) -> Tensor:
        """The logits that predict each supervised token of a batch, [N, V]."""
        return logits_of(self.model, batch.inputs, batch.rows, batch.columns)

    @torch.no_grad()
    def keeps_head_form(self) -> bool:
        """Whether the form of the head that the loss used is still that of the model's logits."""
        with torch.compiler.set_stance("force_eager"):  # not compiled for a few tokens
            return self.head_form is None or recognise(self.model) == self.head_form

    @property
    def has_adapter(self) -> bool:
        """Whether it trains an adapter that is not merged yet."""
        return hasattr(self.model, "merge_and_unload")

    def finish(self, dtype: torch.dtype) -> None:
        """Round the weights to `dtype`, in which they are saved, after merging adapters."""
        if self.has_adapter:
            self.model = self.model.merge_and_unload()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.to(dtype))


def load_student(
    base: ModelFiles, gradient_checkpointing: bool, adapters: Adapters | None = None
) -> Student:
    """The model with float32 weights, in training mode; with `adapters`, only these train.

    Raises UserError as `load_model` does, for a quantised model, for one that is not causal, and
    for the text model alone of a vision-language checkpoint.
    """
    model, unexpected = load_reported(base, torch.float32)
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"model {base.name}: its weights are quantised and cannot be trained: train the model "
            "that it was made from"
        )
    check_causal(base.name, model)
    lost = lost_tensors(base, model, unexpected)
    freeze_other_parts(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # or frozen embeddings would detach the graph
    student = Student(model if adapters is None else with_adapters(model, adapters), lost)
    return student.train()  # a loaded model has neither dropout nor checkpointing
