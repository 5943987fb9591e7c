"""Probabilities as codes: in one byte those of targets, in two those of scores.

The code of a target's probability is that of the level with the nearest logarithm.

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
    codes = np.take(_CODES, probs.view(np.int32) >> _SHIFT)  # `take` is faster than an index
    return codes + (probs < np.take(_LEAST, codes))


def probs_of(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probabilities of codes."""
    return _PROBS[codes]


# The levels of scores: equally spaced in the square root of the probability, and for small
# probabilities in the logarithm. The mean divergence is below 1e-6 nats, and no probability is off
# by more than 2 %. Where a float32 cannot hold the probability, levels are 1 % of the logarithm
# apart.
_FINE_ROOT = 3e-4
_FINE_LOG = 0.04  # nats
_FINE_LOG_FROM = 2 * math.log(2 * _FINE_ROOT / _FINE_LOG)  # where both steps are equal
_FINE_LOG_CODE = 1 / _FINE_ROOT - 2 / _FINE_LOG
_TINY_FROM, _TINY_RATIO = -104.0, 1.01
_TINY_CODE = _FINE_LOG_CODE + (_FINE_LOG_FROM - _TINY_FROM) / _FINE_LOG
_LEAST_LOG = -1e4
FINE_ZERO = math.ceil(_TINY_CODE + math.log(_LEAST_LOG / _TINY_FROM) / math.log(_TINY_RATIO))


def _fine_levels() -> NDArray[np.float64]:
    """The log-probability of each code, descending; the last is that of 0."""
    code = np.arange(FINE_ZERO)
    by_root = 2 * np.log1p(-_FINE_ROOT * np.minimum(code, _FINE_LOG_CODE))
    by_log = _FINE_LOG_FROM - (code - _FINE_LOG_CODE) * _FINE_LOG
    tiny = _TINY_FROM * _TINY_RATIO ** np.maximum(code - _TINY_CODE, 0)
    levels = np.where(code < _FINE_LOG_CODE, by_root, np.where(code < _TINY_CODE, by_log, tiny))
    return np.append(levels, -np.inf)


FINE_LEVELS = _fine_levels()


def fine_codes_of(log_probs: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The codes of log-probabilities; one above 0 counts as 0."""
    logs = np.minimum(log_probs, np.float32(0))
    roots = np.exp(logs * np.float32(0.5))
    by_root = (1 - roots) * np.float32(1 / _FINE_ROOT)
    by_log = logs * np.float32(-1 / _FINE_LOG)
    by_log += np.float32(_FINE_LOG_CODE + _FINE_LOG_FROM / _FINE_LOG)
    codes = np.where(logs > np.float32(_FINE_LOG_FROM), by_root, by_log)
    is_tiny = logs < _TINY_FROM
    if is_tiny.any():
        tiny = np.log(logs[is_tiny] / _TINY_FROM) / math.log(_TINY_RATIO) + _TINY_CODE
        least = np.where(np.isinf(logs[is_tiny]), FINE_ZERO, FINE_ZERO - 1)
        codes[is_tiny] = np.minimum(tiny, least)
    return np.rint(codes).astype(np.uint16)
