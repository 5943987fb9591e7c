"""Probabilities in one byte: the code of the level with the nearest logarithm.

Levels are equally spaced in the square root of the probability, which spreads the divergence of a
position evenly over its entries. For small probabilities they are equally spaced in the logarithm,
so that no entry is off by more than 16 %. Below one millionth levels are more than a nat apart,
below e^-24 seven nats.
"""

import math

import numpy as np
from numpy.typing import NDArray

ZERO = 255  # the code of a probability of 0
_ROOTS = 220  # steps of the square root from 1 to 0
_LOG_STEP = 0.3  # nats
_WIDE_FROM = 14.0  # nats below 1
_SHIFT = 15  # bits of a float32 to drop; the others give a probability to 0.4 %


def _levels() -> NDArray[np.float64]:
    """The log-probability of each code, [256], descending.

    Steps of the square root lead down from 1 until a step of the logarithm is finer. From
    `_WIDE_FROM` on, levels are evenly spaced up to 24 and up to 88 nats, the smallest normal
    float32.
    """
    log_from = 2 * math.log(_ROOTS * _LOG_STEP / 2)  # nats below 1 where both steps are equal
    log_code = _ROOTS - 2 / _LOG_STEP
    wide_code = log_code + (_WIDE_FROM - log_from) / _LOG_STEP
    code = np.arange(ZERO)
    by_root = -2 * np.log1p(-np.minimum(code, log_code) / _ROOTS)
    by_log = np.interp(code, (log_code, wide_code, 245, 254), (log_from, _WIDE_FROM, 24, 88))
    return np.append(-np.where(code < log_code, by_root, by_log), -np.inf)


LEVELS = _levels()
_PROBS = np.exp(LEVELS).astype(np.float32)
# the smallest probability of each code but the last
_LEAST = np.exp((LEVELS[:-2] + LEVELS[1:-1]) / 2).astype(np.float32)
_LEAST = np.append(_LEAST, np.nextafter(np.float32(0), np.float32(1)))
# the code of the largest float32 with given leading bits; at most one more code has them
_LARGEST = ((np.arange(1 << 15, dtype=np.int32) + 1 << _SHIFT) - 1).view(np.float32)
_CODES = np.searchsorted(-_LEAST, -_LARGEST, side="left").astype(np.uint8)


def codes_of(probs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The codes of probabilities."""
    codes = _CODES[probs.view(np.int32) >> _SHIFT]
    return codes + (probs < _LEAST[codes])


def probs_of(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probabilities of codes."""
    return _PROBS[codes]
