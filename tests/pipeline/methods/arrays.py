"""Arrays of both libraries, and random distributions, for tests of the rules."""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

NONE = -math.inf
LIBRARIES = ("numpy", "torch")
seeds = st.integers(0, 2**32 - 1)


def as_array(values: Any, library: str = "numpy") -> Any:
    array = np.asarray(values, float)
    return array if library == "numpy" else torch.from_numpy(array)


def random_log_probs(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    logits = spread * rng.standard_normal(size)
    return logits - np.logaddexp.reduce(logits)


def log_of_sum(values: np.ndarray) -> float:
    """log Σ exp, −∞ of none."""
    return float(np.logaddexp.reduce(values)) if len(values) else NONE
