"""Target examples as one batch of tensors.

B examples, T tokens of the longest, N supervised positions of all of them end to end, S entries of
the widest support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...pipeline.format.records import Ints, TargetExample
from .segments import Segments, moved, segments_of


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

    def to(self, device: torch.device, non_blocking: bool = False) -> "SparseTargets":
        """The same targets on a device."""
        return replace(self, **moved(self, device, non_blocking))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples as the rows of a batch, and the rows and columns of supervised tokens' logits.

    Padded, every example has a row, filled up on the right. Packed, all are in one row: their
    common beginning once, then the rest of each, up to its last supervised token. `segments` are
    these parts; with them `packed_attention` keeps the examples apart.

    The logits that predict a token are one column before it, or, if it is the first of its segment,
    in the last column of the common beginning.
    """

    ids: list[str]
    input_ids: Tensor  # [B, T], [1, sum of segments] if packed
    attention_mask: Tensor | None  # [B, T], None if packed
    rows: Tensor  # [N]
    columns: Tensor  # [N]
    targets: SparseTargets
    position_ids: Tensor | None = None  # [1, sum of segments], None if padded
    segments: Segments | None = None  # None if padded

    @property
    def tokens(self) -> int:
        """The number of supervised tokens, N."""
        return len(self.rows)

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model."""
        if self.position_ids is not None:
            packed = {"position_ids": self.position_ids, "segments": self.segments}
            return {"input_ids": self.input_ids, **packed}
        assert self.attention_mask is not None
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return replace(self, **moved(self, device, non_blocking))


def padded_batch(examples: Sequence[TargetExample]) -> Batch:
    """Join examples into a padded batch.

    Without examples the batch has one token and N = 0: a rank that has run out of samples still
    takes part in collective operations.
    """
    lengths_B = np.array([len(example.input_ids) for example in examples] or [1])
    is_token_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
    input_ids_BT = np.zeros(is_token_BT.shape, np.int64)  # causal attention never looks right
    if examples:
        input_ids_BT[is_token_BT] = _join(examples, "input_ids", np.int64)
    targets = _sparse_targets(examples)
    return Batch(
        ids=[example.id for example in examples],
        input_ids=torch.from_numpy(input_ids_BT),
        attention_mask=torch.from_numpy(is_token_BT.astype(np.int64)),
        rows=targets.example_of,
        columns=torch.from_numpy(_join(examples, "positions", np.int64) - 1),
        targets=targets,
    )


def packed_batch(examples: Sequence[TargetExample]) -> Batch:
    """Join examples into a packed batch; of one token and N = 0 without examples."""
    # tokens after the last supervised one predict none
    used = [each.input_ids[: each.positions.max(initial=1)] for each in examples]
    used = used or [np.zeros(1, np.int32)]
    shared = _common_beginning(used)
    rests_B = np.array([len(tokens) - shared for tokens in used])
    starts_B = shared + np.cumsum(rests_B) - rests_B
    parts = [used[0][:shared], *(tokens[shared:] for tokens in used)]
    places = [np.arange(shared), *(np.arange(shared, shared + rest) for rest in rests_B)]
    targets = _sparse_targets(examples)
    columns_N = _join(examples, "positions", np.int64) - 1
    moved_N = starts_B[targets.example_of.numpy()] + columns_N - shared
    return Batch(
        ids=[example.id for example in examples],
        input_ids=torch.from_numpy(np.concatenate(parts, dtype=np.int64)[None]),
        attention_mask=None,
        rows=torch.zeros_like(targets.example_of),
        columns=torch.from_numpy(np.where(columns_N < shared, columns_N, moved_N)),
        targets=targets,
        position_ids=torch.from_numpy(np.concatenate(places)[None]),
        segments=segments_of((shared, *(int(rest) for rest in rests_B if rest))),
    )


@dataclass(frozen=True, slots=True)
class Collator:
    """Joins examples into a batch, with the targets of a run's method."""

    packed: bool  # else padded
    tokens_alone: bool = False  # `observed_only`

    def __call__(self, examples: Sequence[TargetExample]) -> Batch:
        batch = packed_batch(examples) if self.packed else padded_batch(examples)
        return replace(batch, targets=observed_only(batch.targets)) if self.tokens_alone else batch


def observed_only(targets: SparseTargets) -> SparseTargets:
    """The same targets, one-hot and of weight 1, as for `--method sft`.

    The residual stays, so that the divergence from it can still be measured.
    """
    ones_N = torch.ones_like(targets.trust)
    return replace(targets, trust=ones_N, weights=ones_N)


def _sparse_targets(examples: Sequence[TargetExample]) -> SparseTargets:
    observed_ids_N = _join(examples, "observed_ids", np.int64)
    counts_N = _join(examples, "counts", np.int64)
    support_mask_NS = np.arange(counts_N.max(initial=1)) < counts_N[:, None]
    support_ids_NS = np.repeat(observed_ids_N[:, None], support_mask_NS.shape[1], axis=1)
    support_ids_NS[support_mask_NS] = _join(examples, "support_ids", np.int64)
    support_probs_NS = np.zeros(support_mask_NS.shape, np.float32)
    support_probs_NS[support_mask_NS] = _join(examples, "support_probs", np.float32)
    positions_B = [len(example.positions) for example in examples]
    arrays = {
        "observed_ids": observed_ids_N,
        "example_of": np.repeat(np.arange(len(examples)), positions_B),
        "support_ids": support_ids_NS,
        "support_mask": support_mask_NS,
        "support_probs": support_probs_NS,
    }
    for name in ("trust", "weights", "tail_mass"):
        arrays[name] = _join(examples, name, np.float32)
    return SparseTargets(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _common_beginning(rows: Sequence[Ints]) -> int:
    """The length of the common beginning of all rows, in tokens."""
    shortest = min(map(len, rows))
    heads = np.stack([row[:shortest] for row in rows])
    is_same = (heads == heads[0]).all(axis=0)
    return shortest if is_same.all() else int(is_same.argmin())


def _join(examples: Sequence[TargetExample], name: str, dtype: type) -> NDArray[Any]:
    """A field of all examples, end to end."""
    parts = [getattr(example, name) for example in examples]
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)
