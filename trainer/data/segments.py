"""The parts of a packed batch, as attention needs them.

T tokens of the pack, K keys that its parts attend to, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The common beginning of packed examples, and the rest of each.

    The common beginning attends to itself, the rest of an example to the common beginning and to
    itself. Each is a part; a beginning of no token is none.
    """

    lengths: tuple[int, ...]  # of the beginning, possibly 0, and of the rest of each example
    query_ends: Tensor  # [P + 1] int32: where the tokens of each part end, 0 before the first
    key_ends: Tensor  # [P + 1] int32: the same for its keys
    keys: Tensor | None  # [K] the token of each key; None without a common beginning: the tokens
    longest_query: int
    longest_key: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        """The same parts on a device."""
        return replace(self, **moved(self, device, non_blocking))


def segments_of(lengths: Sequence[int]) -> Segments:
    """The parts of a pack, from the lengths of the common beginning and of the rest of each."""
    shared, *rests = lengths
    queries_P = np.array([*([shared] if shared else []), *rests], np.int64)
    keys_P = np.array([*([shared] if shared else []), *(shared + rest for rest in rests)], np.int64)
    ends_P = np.cumsum(queries_P)
    keys = None
    if shared:
        starts_P = ends_P - queries_P
        beginning = np.arange(shared)
        rest = [np.arange(start, end) for start, end in zip(starts_P[1:], ends_P[1:], strict=True)]
        keys = np.concatenate([beginning, *(part for own in rest for part in (beginning, own))])
    return Segments(
        lengths=tuple(lengths),
        query_ends=_ends(ends_P),
        key_ends=_ends(np.cumsum(keys_P)),
        keys=None if keys is None else torch.from_numpy(keys),
        longest_query=int(queries_P.max()),
        longest_key=int(keys_P.max()),
    )


def _ends(ends_P: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], ends_P]).astype(np.int32))


def moved(record: Any, device: torch.device, non_blocking: bool) -> dict[str, Any]:
    """The fields of a dataclass that can be moved, on a device.

    From pinned memory they are copied without waiting for the device, if `non_blocking`.
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    movable = {name: value for name, value in values.items() if hasattr(value, "to")}
    if non_blocking:
        movable |= {
            name: value.pin_memory() for name, value in movable.items() if isinstance(value, Tensor)
        }
    return {name: value.to(device, non_blocking=non_blocking) for name, value in movable.items()}
