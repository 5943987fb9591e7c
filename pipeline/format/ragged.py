"""Ragged lists: values end to end, and the length of each list."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def padded(counts: NDArray[np.integer], values: NDArray[Any], fill: Any) -> NDArray[Any]:
    """Ragged values [K] as [N, S], filled up with `fill`: a view, if all counts are equal."""
    width = int(counts.max(initial=1))
    if len(values) == len(counts) * width:
        return values.reshape(len(counts), width)
    filled = np.full((len(counts), width), fill, values.dtype)
    filled[_is_entry(counts, width)] = values
    return filled


def unpadded(counts: NDArray[np.integer], values_NS: NDArray[Any]) -> NDArray[Any]:
    """The ragged values [K] of [N, S]: a view, if all counts are S."""
    width = values_NS.shape[1]
    if counts.min(initial=width) == width:
        return values_NS.reshape(-1)
    return values_NS[_is_entry(counts, width)]


def _is_entry(counts: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    narrow = np.min_scalar_type(width)  # in one byte it takes a fifth of the time
    return np.arange(width, dtype=narrow) < counts.astype(narrow)[:, None]


def segment_sums(values: NDArray[Any], lengths: NDArray[np.integer]) -> NDArray[Any]:
    """The sum of each list, 0 for an empty one."""
    starts = np.cumsum(lengths) - lengths
    sums = np.zeros(len(lengths), values.dtype)
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums
