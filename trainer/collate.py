"""Target examples as one batch of tensors.

B examples, T tokens of the longest, N supervised positions of all of them end to end, S entries of
the widest support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..pipeline.records import TargetExample


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """Targets Q = trust·δ_y + (1 − trust)·residual, the residual known on a support.

    A support narrower than S is padded with its own observed token at probability 0, so that every
    id of a row lies in its support; `support_mask` is False at the padding.
    """

    observed_ids: Tensor  # [N]
    example_of: Tensor  # [N] each position's example, numbered within the batch
    trust: Tensor  # [N]
    weights: Tensor  # [N]
    support_ids: Tensor  # [N, S]
    support_mask: Tensor  # [N, S]
    support_probs: Tensor  # [N, S]
    tail_mass: Tensor  # [N]

    def to(self, device: torch.device) -> "SparseTargets":
        """The same targets on a device."""
        return SparseTargets(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples padded on the right, and where in them the logits of supervised tokens stand.

    The logits at column t predict token t + 1, so the token at position p is scored at column
    p − 1.
    """

    ids: list[str]
    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    rows: Tensor  # [N]
    columns: Tensor  # [N]
    targets: SparseTargets

    @property
    def tokens(self) -> int:
        """The number of supervised tokens, N."""
        return len(self.rows)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.ids,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.rows.to(device),
            self.columns.to(device),
            self.targets.to(device),
        )


def collate(examples: Sequence[TargetExample]) -> Batch:
    """Join examples into a batch.

    No examples give a batch of one token and N = 0: a rank that has run out of samples can still
    take its part in the others' gradient.
    """
    lengths_B = np.array([len(example.input_ids) for example in examples] or [1])
    is_token_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
    input_ids_BT = np.zeros(is_token_BT.shape, np.int64)  # causal attention never looks right
    if examples:
        input_ids_BT[is_token_BT] = _join(examples, "input_ids", np.int64)
    positions_per_row = [len(example.positions) for example in examples]
    rows = torch.from_numpy(np.repeat(np.arange(len(examples)), positions_per_row))
    return Batch(
        ids=[example.id for example in examples],
        input_ids=torch.from_numpy(input_ids_BT),
        attention_mask=torch.from_numpy(is_token_BT.astype(np.int64)),
        rows=rows,
        columns=torch.from_numpy(_join(examples, "positions", np.int64) - 1),
        targets=_sparse_targets(examples, rows),
    )


def observed_only(batch: Batch) -> Batch:
    """The same batch with plain one-hot targets of weight 1, as `--method sft` trains on.

    The residual stays, so that the distance to it can still be measured.
    """
    ones_N = torch.ones_like(batch.targets.trust)
    return replace(batch, targets=replace(batch.targets, trust=ones_N, weights=ones_N))


def _sparse_targets(examples: Sequence[TargetExample], rows: Tensor) -> SparseTargets:
    observed_ids_N = _join(examples, "observed_ids", np.int64)
    counts_N = _join(examples, "counts", np.int64)
    support_mask_NS = np.arange(counts_N.max(initial=1)) < counts_N[:, None]
    support_ids_NS = np.repeat(observed_ids_N[:, None], support_mask_NS.shape[1], axis=1)
    support_ids_NS[support_mask_NS] = _join(examples, "support_ids", np.int64)
    support_probs_NS = np.zeros(support_mask_NS.shape, np.float32)
    support_probs_NS[support_mask_NS] = _join(examples, "support_probs", np.float32)
    return SparseTargets(
        observed_ids=torch.from_numpy(observed_ids_N),
        example_of=rows,
        trust=torch.from_numpy(_join(examples, "trust", np.float32)),
        weights=torch.from_numpy(_join(examples, "weights", np.float32)),
        support_ids=torch.from_numpy(support_ids_NS),
        support_mask=torch.from_numpy(support_mask_NS),
        support_probs=torch.from_numpy(support_probs_NS),
        tail_mass=torch.from_numpy(_join(examples, "tail_mass", np.float32)),
    )


def _join(examples: Sequence[TargetExample], name: str, dtype: type) -> NDArray[Any]:
    """A field of all examples, end to end."""
    parts = [getattr(example, name) for example in examples]
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)
