"""Probabilities in one byte: the code of the level whose logarithm is nearest.

A step of the probability's square root, the same everywhere, spreads a position's divergence evenly
over its entries; further down a step of the logarithm takes over, so that no entry is off by more
than 16 %. Below a millionth levels are more than a nat apart, and below e^-24 seven.
"""

import math

import numpy as np
from numpy.typing import NDArray

ZERO = 255  # the code of a probability of 0
_WIDE_FROM = 14.0  # nats below 1
_SHIFT = 15  # of a float32's bits: what is left tells a probability to 0.4 %


def _levels(roots: int, log_step: float, *corners: tuple[int, float]) -> NDArray[np.float64]:
    """The log-probability of each code, [256], descending.

    `roots` steps of the square root lead from 1 to 0, and are left where a step of the logarithm is
    finer. `corners` are the codes, and nats below 1, between which levels lie evenly at last.
    """
    log_from = 2 * math.log(roots * log_step / 2)  # nats below 1 where both steps are the same
    log_code = roots - 2 / log_step
    wide_code = log_code + (_WIDE_FROM - log_from) / log_step
    codes, nats = zip((log_code, log_from), (wide_code, _WIDE_FROM), *corners, strict=True)
    code = np.arange(ZERO)
    by_root = -2 * np.log1p(-np.minimum(code, log_code) / roots)
    below = np.where(code < log_code, by_root, np.interp(code, codes, nats))
    return np.append(-below, -np.inf)


# by the version of the format that they came with; 88 nats are the smallest normal float32
LEVELS = {3: _levels(128, 0.15, (254, 88)), 4: _levels(220, 0.3, (245, 24), (254, 88))}
NEWEST = max(LEVELS)
_PROBS = {version: np.exp(levels).astype(np.float32) for version, levels in LEVELS.items()}

# the smallest probability of each code but the last
_LEAST = np.exp((LEVELS[NEWEST][:-2] + LEVELS[NEWEST][1:-1]) / 2).astype(np.float32)
_LEAST = np.append(_LEAST, np.nextafter(np.float32(0), np.float32(1)))
# the code of the largest float32 with the same leading bits; the next one begins below it, if any
_LARGEST = ((np.arange(1 << 15, dtype=np.int32) + 1 << _SHIFT) - 1).view(np.float32)
_CODES = np.searchsorted(-_LEAST, -_LARGEST, side="left").astype(np.uint8)


def codes_of(probs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The newest levels nearest to probabilities, as codes."""
    codes = _CODES[probs.view(np.int32) >> _SHIFT]
    return codes + (probs < _LEAST[codes])


def probs_of(codes: NDArray[np.uint8], levels: int) -> NDArray[np.float32]:
    """The probabilities of codes, by the version of the format whose levels they are."""
    return _PROBS[levels][codes]
