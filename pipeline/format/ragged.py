"""Ragged lists: values end to end, and how many of them belong to each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def segment_sums(values: NDArray[Any], lengths: NDArray[np.integer]) -> NDArray[Any]:
    """The sum of each run of `lengths[i]` values, 0 for an empty run."""
    starts = np.cumsum(lengths) - lengths
    sums = np.zeros(len(lengths), values.dtype)
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums
