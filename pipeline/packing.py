"""How target distributions are packed: ids as steps between ranks, probabilities as logarithms.

At each position the support is stored in the order of its ids' ranks, `frequent_ids` first and all
other ids after them in their own order, and each rank as its step from the one before (the first as
itself), low byte and the rest apart. Sorted steps take half the bytes of ids.

Probabilities are stored as natural logarithms, those of the entries and of the tail, and scaled to
add up to 1 when they are read, so a support and its tail never contradict each other. As `uint8`
each is a code, the place in `LEVELS` of the level nearest to it.

N positions, K entries of all of them end to end, V ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .ragged import segment_sums

Precision = Literal["uint8", "float16", "float32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# The levels of `uint8`. A step of the probability's square root, the same everywhere, spreads a
# position's divergence evenly over its entries; further down a step of the logarithm takes over, so
# that no entry is off by more than 8 %. Below a millionth they are half a nat off at most.
_SQRT_STEP = 1 / 128
_LOG_STEP = 0.15
_LOG_FROM = 2 * math.log(_LOG_STEP / (2 * _SQRT_STEP))  # nats below 1 where both steps are the same
_WIDE_FROM, _LOWEST = 14.0, 88.0  # nats below 1; the second is the smallest number of float32
_ZERO = 255  # the code of a probability of 0
_LOG_CODE = (1 - math.exp(-_LOG_FROM / 2)) / _SQRT_STEP
_WIDE_CODE = _LOG_CODE + (_WIDE_FROM - _LOG_FROM) / _LOG_STEP
_WIDE_STEP = (_LOWEST - _WIDE_FROM) / (_ZERO - 1 - _WIDE_CODE)


def _levels() -> NDArray[np.float64]:
    codes = np.arange(_ZERO, dtype=np.float64)
    by_sqrt = -2 * np.log1p(-np.minimum(codes, _LOG_CODE) * _SQRT_STEP)
    by_log = _LOG_FROM + (codes - _LOG_CODE) * _LOG_STEP
    wide = _WIDE_FROM + (codes - _WIDE_CODE) * _WIDE_STEP
    below = np.where(codes < _LOG_CODE, by_sqrt, np.maximum(by_log, wide))
    return np.append(-below, -np.inf)


LEVELS = _levels()  # the log-probability of each code, [256]
_LARGEST_TABLE = 2**20  # ids; no list of them all is held of a larger vocabulary
_LEVEL_PROBS = np.exp(LEVELS).astype(np.float32)
_SMALLEST_PROB = np.float32(np.exp(-_LOWEST))


@dataclass(frozen=True, slots=True)
class Packing:
    """What a folder's settings say of how its targets are packed."""

    precision: Precision
    vocab_size: int
    most_entries: int  # of any position
    frequent_ids: tuple[int, ...] = ()  # the first ranks


def ids_of(ranks: NDArray[np.integer], packing: Packing) -> NDArray[np.int64]:
    """The ids of ranks: those listed, and behind them all others in their own order."""
    listed = np.array(packing.frequent_ids, np.int64)
    passed = np.sort(listed) - np.arange(len(listed))  # others below each listed id
    others = np.maximum(ranks.astype(np.int64) - len(listed), 0)
    others += np.searchsorted(passed, others, side="right")
    return np.where(
        ranks < len(listed), np.append(listed, 0)[np.minimum(ranks, len(listed))], others
    )


def ranks_of(ids: NDArray[np.integer], packing: Packing) -> NDArray[np.int64]:
    """The ranks of ids, the inverse of `ids_of`."""
    listed = np.array(packing.frequent_ids, np.int64)
    order = np.argsort(listed)
    ids = ids.astype(np.int64)  # some ranks are above the largest of 32 bits on the way
    below = np.searchsorted(listed[order], ids)
    is_listed = np.append(listed[order], -1)[below] == ids
    return np.where(is_listed, np.append(order, 0)[below], ids + len(listed) - below)


@lru_cache(4)
def _id_table(packing: Packing) -> NDArray[np.int32]:
    return ids_of(np.arange(packing.vocab_size), packing).astype(np.int32)


@lru_cache(4)
def _rank_table(packing: Packing) -> NDArray[np.int32]:
    return ranks_of(np.arange(packing.vocab_size), packing).astype(np.int32)


def pack(arrays: dict[str, NDArray[Any]], packing: Packing) -> dict[str, NDArray[Any]]:
    """The stored columns of a batch of targets, for those of its records."""
    counts, ids = arrays["counts"], arrays["support_ids"]
    assert ((ids >= 0) & (ids < packing.vocab_size)).all(), "ids outside of the vocabulary"
    has_table = packing.vocab_size <= _LARGEST_TABLE
    ranks = _rank_table(packing)[ids] if has_table else ranks_of(ids, packing)
    keys = np.repeat(np.arange(len(counts)) * packing.vocab_size, counts) + ranks
    order = np.argsort(keys)
    ranks = ranks[order]
    steps = np.diff(ranks, prepend=0)
    starts = (np.cumsum(counts) - counts)[counts > 0]
    steps[starts] = ranks[starts]
    rest = {
        name: values
        for name, values in arrays.items()
        if name not in ("support_ids", "support_probs", "tail_mass")
    }
    return rest | {
        "rank_steps_low": steps & 0xFF,
        "rank_steps_high": steps >> 8,
        "support_log_probs": _stored(arrays["support_probs"][order], packing.precision),
        "tail_log_probs": _stored(arrays["tail_mass"], packing.precision),
    }


# makes the error of a level's value at some place of a batch
Wrong = Callable[[str, int, str], UserError]


def unpack(
    arrays: dict[str, NDArray[Any]], packing: Packing, wrong: Wrong
) -> dict[str, NDArray[Any]]:
    """The records' columns of a batch, for those that are stored; the counts add up.

    Raises what `wrong` makes for ids and numbers that nobody packed.
    """
    rest = dict(arrays)
    low, high = rest.pop("rank_steps_low"), rest.pop("rank_steps_high")
    weights = _weights(rest.pop("support_log_probs"))
    tail_weights = _weights(rest.pop("tail_log_probs"))
    counts = rest["counts"].astype(np.int64)
    totals = segment_sums(weights, counts) + tail_weights
    is_distribution = np.isfinite(totals) & (totals > 0)
    if not is_distribution.all():
        place = int(np.argmin(is_distribution))
        raise wrong("position", place, "support_log_probs holds what is no distribution")
    steps = (high.astype(np.uint32) << np.uint32(8)) | low
    return rest | {
        "support_ids": _ids(steps, counts, packing, wrong),
        "support_probs": weights / np.repeat(totals, counts),
        "tail_mass": tail_weights / totals,
    }


def _ids(
    steps: NDArray[np.uint32], counts: NDArray[np.int64], packing: Packing, wrong: Wrong
) -> NDArray[np.int32]:
    """The ids at the ends of the steps; sums wrap around, and back where the base is taken off."""
    sums = np.cumsum(steps, dtype=np.uint32)
    ends = np.cumsum(counts)
    bases = np.append(np.uint32(0), sums)[ends - counts]
    ranks = sums - np.repeat(bases, counts)
    if len(ranks) and ranks.max() >= packing.vocab_size:
        place = int(np.argmax(ranks >= packing.vocab_size))
        raise wrong("entry", place, "rank_steps_high leads out of the vocabulary")
    if packing.vocab_size <= _LARGEST_TABLE:
        return _id_table(packing)[ranks]
    return ids_of(ranks, packing).astype(np.int32)


def _stored(probs: NDArray[np.floating], precision: Precision) -> NDArray[Any]:
    if precision != "uint8":
        with np.errstate(divide="ignore"):
            return np.log(probs.astype(np.float64)).astype(precision)
    below = -np.log(np.clip(probs, _SMALLEST_PROB, 1))
    by_sqrt = (1 - np.sqrt(probs)) / _SQRT_STEP
    by_log = _LOG_CODE + (below - _LOG_FROM) / _LOG_STEP
    wide = _WIDE_CODE + (below - _WIDE_FROM) / _WIDE_STEP
    codes = np.where(below < _LOG_FROM, by_sqrt, np.minimum(by_log, wide))
    return np.where(probs > 0, np.rint(codes), _ZERO).astype(np.uint8)


def _weights(log_probs: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities up to a factor."""
    if log_probs.dtype == np.uint8:
        return _LEVEL_PROBS[log_probs]
    with np.errstate(over="ignore"):
        return np.exp(log_probs, dtype=np.float32)
