"""Encodes examples as compact columns of bytes, which the page decodes.

A column is a quantised array: `share` and `nats` and counts as uint16, probabilities of
alternatives as uint8. A chunk holds the columns of a few examples end to end, each column one byte
plane after another (equal bytes side by side compress well), then deflated, then in base64.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.targets.distributions import Supports
from ..looking.measures import Floats

SMALLEST_SHOWN = 0.002  # alternatives below are left out, except for the observed token
MOST_ROWS = 8  # alternatives at a position, of all distributions together

# units of the stored numbers: log-probabilities and shares to 0.001, nats to 0.01
_PER_UNIT = {"log-prob": 1000, "share": 1000, "nats": 100, "rank": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Alternatives:
    """The most probable tokens of some distributions at N positions, R in all, in order."""

    counts: NDArray[np.uint8]  # [N]
    ids: NDArray[np.int32]  # [R]
    probs: dict[str, NDArray[np.uint8]]  # [R] by role: (255·√p), 0 if unknown


def quantised(kind: str, values: Floats) -> NDArray[np.uint16]:
    """Values, or −log of them for "log-prob", as whole numbers of units, clipped to the largest."""
    if kind == "log-prob":
        values = -np.log(np.maximum(values, 1e-30))
    units = np.rint(np.nan_to_num(values, posinf=1e9) * _PER_UNIT[kind])
    return np.clip(units, 0, 2**16 - 1).astype(np.uint16)


def alternatives(
    panels: dict[str, Supports], observed_ids: NDArray[np.int32], most: int
) -> Alternatives:
    """The observed token and the `most` most probable tokens of each distribution."""
    size = len(observed_ids)
    own_keys = np.arange(size) << 32 | observed_ids
    keys = {
        role: each.position_of.astype(np.int64) << 32 | each.ids for role, each in panels.items()
    }
    wanted = [own_keys]
    for role, each in panels.items():
        wanted.append(keys[role][(each.ranks < most) & (each.probs >= SMALLEST_SHOWN)])
    kept = np.unique(np.concatenate(wanted))
    probs = {role: _looked_up(keys[role], each.probs, kept) for role, each in panels.items()}
    first = next(iter(probs.values()))
    highest = np.max(list(probs.values()), axis=0)
    is_other = ~np.isin(kept, own_keys)
    # if there are too many, the least probable are dropped, but not the observed token
    order = np.lexsort((-highest, is_other, kept >> 32))
    rank = _places(kept[order] >> 32, size)
    shown = order[rank < MOST_ROWS]
    shown = shown[np.lexsort((-highest[shown], -first[shown], kept[shown] >> 32))]
    return Alternatives(
        np.bincount(kept[shown] >> 32, minlength=size).astype(np.uint8),
        (kept[shown] & 0xFFFFFFFF).astype(np.int32),
        {role: np.rint(255 * np.sqrt(p[shown])).astype(np.uint8) for role, p in probs.items()},
    )


def packed(columns: Sequence[NDArray[Any]]) -> str:
    """Columns of 1, 2 or 4-byte integers as base64 text, each prefixed with its length."""
    parts = []
    for column in columns:
        planes = column.view(np.uint8).reshape(len(column), column.itemsize).T
        parts += [np.uint32(len(column)).tobytes(), planes.tobytes()]
    return compressed(b"".join(parts))


def compressed(content: bytes) -> str:
    """Deflated bytes as base64 text."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _looked_up(keys: NDArray[np.int64], probs: Floats, wanted: NDArray[np.int64]) -> Floats:
    """The probabilities at some keys; 0 for missing ones."""
    if not len(keys):
        return np.zeros(len(wanted))
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[place]
    return np.where(keys[found] == wanted, probs[found], 0.0)


def _places(positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The index of each entry within its position."""
    counts = np.bincount(positions, minlength=size)
    return np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
