"""Examples to score."""

import numpy as np
from numpy.typing import NDArray
from qpipe.pipeline.format.records import WeightedExample


def unweighted(
    name: str, input_ids: NDArray[np.int32], positions: NDArray[np.int32]
) -> WeightedExample:
    """An example whose demonstration came without weights."""
    return WeightedExample(name, input_ids, positions, np.ones(len(positions), np.float32))
