"""Targets in other training loops: `transformers.Trainer`, TRL's trainers, or your own.

    trainer = with_target_loss(SFTTrainer, "targets/")(
        model=model,
        train_dataset=TargetDataset("targets/"),
        data_collator=TargetCollator(),
        args=SFTConfig(remove_unused_columns=False, …),
    )

N supervised positions of a batch, B rows, T tokens of the longest, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipeline.errors import UserError
from ..pipeline.folders.mixing import parts_of
from ..pipeline.format.records import TargetExample
from ..pipeline.storage.remote import open_path
from .data.batch import SparseTargets, observed_only, padded_batch
from .data.dataset import TargetDataset
from .loss.objective import Objective, common_objective

__all__ = ["TargetCollator", "TargetDataset", "target_loss", "target_objective", "with_target_loss"]

IGNORED = -100  # the label of a token that does not count
_INTS = ("input_ids", "positions", "counts", "support_ids")
_FLOATS = ("trust", "support_probs", "tail_mass", "weights")
_TARGETS = tuple(field.name for field in fields(SparseTargets))


class TargetCollator:
    """Rows of a target folder as a batch for `target_loss`.

    A row is a dict of `TargetDataset`, or of `datasets` with `qpipe.pipeline.decoder`. The batch
    has input_ids and attention_mask [B, T], labels [B, T] (the supervised tokens, -100 elsewhere),
    and under `targets` the rest, which models do not read.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = padded_batch([_example(row) for row in rows])
        assert batch.attention_mask is not None
        labels_BT = torch.full_like(batch.input_ids, IGNORED)
        labels_BT[batch.rows, batch.columns + 1] = batch.targets.observed_ids
        targets = {name: getattr(batch.targets, name) for name in _TARGETS}
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels_BT,
            "targets": targets | {"rows": batch.rows, "columns": batch.columns},
        }


def target_objective(folder: str | Path, method: str | None = None) -> Objective:
    """The objective of a target folder or a mixture: its own method, or "sft" on any folder.

    Raises UserError where the folder holds targets of another method.
    """
    return common_objective([part.folder for part in parts_of(open_path(folder))], method)


def target_loss(
    logits_BTV: Tensor,
    targets: Mapping[str, Tensor],
    objective: Objective,
    tokens: Tensor | int | None = None,
) -> Tensor:
    """The loss of a `TargetCollator`'s batch in nats a token: Σ weight·loss, divided by `tokens`.

    `tokens` is the number of supervised tokens of the whole optimizer step, over its micro-batches
    and processes; None means those of this batch.
    """
    rows, columns = targets["rows"], targets["columns"]
    sparse = SparseTargets(**{name: targets[name] for name in _TARGETS})
    sparse = observed_only(sparse) if objective.tokens_alone else sparse
    loss = objective(logits_BTV[rows, columns], sparse)
    return loss.sum / (len(rows) if tokens is None else tokens)


def with_target_loss(trainer: type, folder: str | Path, method: str | None = None) -> type:
    """A subclass of `transformers.Trainer`, or of one of TRL's, that minimises a folder's targets.

    Its batches come from `TargetCollator`; it needs `remove_unused_columns=False`. The loss is
    normalised by the supervised tokens of the whole step, so that neither accumulation nor the
    number of processes changes the gradient. Losses that the trainer would add to its own, such as
    that of a mixture of experts' router, are left out.
    """
    objective = target_objective(folder, method)

    class TargetTrainer(trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.args.remove_unused_columns:
                raise UserError(
                    "the targets are not an argument of the model: set remove_unused_columns=False"
                )
            self.model_accepts_loss_kwargs = True  # or the tokens of a step are not counted

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            )
            loss = target_loss(outputs.logits, inputs["targets"], objective, num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # the gradients are averaged over the processes; their sum is wanted
                loss = loss * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

    TargetTrainer.__name__ = f"Target{trainer.__name__}"
    return TargetTrainer


def _example(row: Mapping[str, Any]) -> TargetExample:
    """A row as a record; joins lists of each position, as `decoder` returns them."""
    values = dict(row)
    missing = [name for name in (*_INTS, *_FLOATS) if name not in row and name != "counts"]
    if missing:
        raise UserError(
            f"a row lacks {missing[0]}: give rows of TargetDataset or of qpipe.pipeline.decoder, "
            "and remove_unused_columns=False"
        )
    if "counts" not in values:
        values["counts"] = [len(entries) for entries in values["support_ids"]]
        for name in ("support_ids", "support_probs"):
            values[name] = list(chain.from_iterable(values[name]))
    ints = {name: np.asarray(values[name], np.int32) for name in _INTS}
    floats = {name: np.asarray(values[name], np.float32) for name in _FLOATS}
    fields_of: dict[str, Any] = {"id": values["id"], **ints, **floats}
    return TargetExample(**fields_of)
