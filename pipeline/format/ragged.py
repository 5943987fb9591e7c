"""Ragged lists: values end to end, and the length of each list."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def segment_sums(values: NDArray[Any], lengths: NDArray[np.integer]) -> NDArray[Any]:
    """The sum of each list, 0 for an empty one."""
    starts = np.cumsum(lengths) - lengths
    sums = np.zeros(len(lengths), values.dtype)
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums
