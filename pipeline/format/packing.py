"""Packs distributions: ids as steps between ranks, probabilities as logarithms.

In targets every id has a rank: `frequent_ids` come first, then all other ids in ascending order.
The support of a position is stored by ascending rank, each rank as the step from the one before
(the first as itself), with the low byte and the rest in separate columns. Sorted steps take half
the bytes of ids.

The probabilities of the entries and of the tail are stored as natural logarithms and are scaled to
add up to 1 when they are read. With `uint8`, each is a one-byte code (`probability_codes`).

Scores keep the order of their entries: ids as they are, in two columns of bytes, and the codes of
log-probabilities, which ascend at each position, as steps from the one before. They too are scaled
to add up to 1 when they are read.

N positions, K entries of all of them end to end, V ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .probability_codes import FINE_LEVELS, FINE_ZERO, codes_of, fine_codes_of, probs_of
from .ragged import padded, segment_sums, unpadded

Precision = Literal["uint8", "float16", "float32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SCORE_PRECISION = "uint16"  # of packed scores

_LARGEST_TABLE = 2**20  # ids of the largest vocabulary whose ranks are kept in a table


@dataclass(frozen=True, slots=True)
class Packing:
    """The packing of a folder's targets."""

    precision: Precision
    vocab_size: int
    most_entries: int  # of any position
    frequent_ids: tuple[int, ...] = ()  # the first ranks


@dataclass(frozen=True, slots=True)
class ScorePacking:
    """The packing of a folder's scores."""

    vocab_size: int


def ids_of(ranks: NDArray[np.integer], packing: Packing) -> NDArray[np.int64]:
    """The ids of ranks."""
    listed = np.array(packing.frequent_ids, np.int64)
    passed = np.sort(listed) - np.arange(len(listed))  # unlisted ids below each listed one
    others = np.maximum(ranks.astype(np.int64) - len(listed), 0)
    others += np.searchsorted(passed, others, side="right")
    return np.where(
        ranks < len(listed), np.append(listed, 0)[np.minimum(ranks, len(listed))], others
    )


def ranks_of(ids: NDArray[np.integer], packing: Packing) -> NDArray[np.int64]:
    """The ranks of ids, the inverse of `ids_of`."""
    listed = np.array(packing.frequent_ids, np.int64)
    order = np.argsort(listed)
    ids = ids.astype(np.int64)  # intermediate ranks may exceed 32 bits
    below = np.searchsorted(listed[order], ids)
    is_listed = np.append(listed[order], -1)[below] == ids
    return np.where(is_listed, np.append(order, 0)[below], ids + len(listed) - below)


@lru_cache(4)
def _id_table(packing: Packing) -> NDArray[np.int32]:
    return ids_of(np.arange(packing.vocab_size), packing).astype(np.int32)


@lru_cache(4)
def _rank_table(packing: Packing) -> NDArray[np.int32]:
    return ranks_of(np.arange(packing.vocab_size), packing).astype(np.int32)


def pack(
    arrays: dict[str, NDArray[Any]], packing: Packing | ScorePacking
) -> dict[str, NDArray[Any]]:
    """Replace the columns of a batch by the stored columns."""
    if isinstance(packing, ScorePacking):
        return _pack_scores(arrays, packing)
    counts, ids = arrays["counts"], arrays["support_ids"]
    assert ((ids >= 0) & (ids < packing.vocab_size)).all(), "ids outside the vocabulary"
    has_table = packing.vocab_size <= _LARGEST_TABLE
    ranks = np.take(_rank_table(packing), ids) if has_table else ranks_of(ids, packing)
    probs = _stored(arrays["support_probs"], packing)
    ranks, probs = _by_rank(ranks, probs, counts, packing.vocab_size)
    steps = _steps(ranks, counts)
    rest = {
        name: values
        for name, values in arrays.items()
        if name not in ("support_ids", "support_probs", "tail_mass")
    }
    return rest | {
        "rank_steps_low": steps.astype(np.uint8),  # the lowest 8 bits
        "rank_steps_high": steps >> 8,
        "support_log_probs": probs,
        "tail_log_probs": _stored(arrays["tail_mass"], packing),
    }


def _by_rank(
    ranks: NDArray[np.integer], values: NDArray[Any], counts: NDArray[np.integer], vocab_size: int
) -> tuple[NDArray[np.integer], NDArray[Any]]:
    """Ranks and the values of their entries, sorted by rank at each position.

    What is sorted holds the rank, and in its lowest bits the value: both are then in order.
    """
    bits = 8 * values.itemsize
    narrow = (vocab_size - 1).bit_length() + bits < 32  # the largest key fills up
    key = np.uint32 if narrow else np.uint64
    keys = ranks.astype(key)
    keys <<= key(bits)
    keys |= values.view(f"u{values.itemsize}")
    keys_NS = padded(counts, keys, np.iinfo(key).max)
    keys_NS.sort(axis=1)
    keys = unpadded(counts, keys_NS)
    return (keys >> key(bits)).astype(np.int32), keys.astype(f"u{values.itemsize}").view(
        values.dtype
    )


# makes the error for the value at a place of a level
Wrong = Callable[[str, int, str], UserError]


def unpack(
    arrays: dict[str, NDArray[Any]], packing: Packing | ScorePacking, wrong: Wrong
) -> dict[str, NDArray[Any]]:
    """Replace the stored columns of a batch by those of records. The counts must add up.

    Raises the error that `wrong` makes for ids and numbers that `pack` does not write.
    """
    if isinstance(packing, ScorePacking):
        return _unpack_scores(arrays, packing, wrong)
    rest = dict(arrays)
    steps = _joined(rest, "rank_steps")
    weights = _weights(rest.pop("support_log_probs"), packing)
    tail_weights = _weights(rest.pop("tail_log_probs"), packing)
    counts = rest["counts"].astype(np.int64)
    totals = segment_sums(weights, counts) + tail_weights
    is_distribution = np.isfinite(totals) & (totals > 0)
    if not is_distribution.all():
        place = int(np.argmin(is_distribution))
        raise wrong("position", place, "support_log_probs is not a distribution")
    return rest | {
        "support_ids": _ids(steps, counts, packing, wrong),
        "support_probs": weights / np.repeat(totals, counts),
        "tail_mass": tail_weights / totals,
    }


def _ids(
    steps: NDArray[np.uint32], counts: NDArray[np.int64], packing: Packing, wrong: Wrong
) -> NDArray[np.int32]:
    """The ids that the steps lead to."""
    ranks = _added_up(steps, counts)
    if len(ranks) and ranks.max() >= packing.vocab_size:
        place = int(np.argmax(ranks >= packing.vocab_size))
        raise wrong("entry", place, "rank_steps_high leads outside the vocabulary")
    if packing.vocab_size <= _LARGEST_TABLE:
        return _id_table(packing)[ranks]
    return ids_of(ranks, packing).astype(np.int32)


def _stored(probs: NDArray[np.float32], packing: Packing) -> NDArray[Any]:
    if packing.precision == "uint8":
        return codes_of(probs)
    with np.errstate(divide="ignore"):
        return np.log(probs.astype(np.float64)).astype(packing.precision)


def _weights(log_probs: NDArray[Any], packing: Packing) -> NDArray[np.float32]:
    """Probabilities up to a factor."""
    if packing.precision == "uint8":
        return probs_of(log_probs)
    with np.errstate(over="ignore"):
        return np.exp(log_probs, dtype=np.float32)


def _steps(values: NDArray[Any], counts: NDArray[np.integer]) -> NDArray[Any]:
    """The differences of neighbours at each position; the first value as it is."""
    steps = values.copy()
    steps[1:] -= values[:-1]
    starts = (np.cumsum(counts) - counts)[counts > 0]
    steps[starts] = values[starts]
    return steps


def _added_up(steps: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The values that the steps lead to. Sums may wrap around; subtracting the base undoes it."""
    sums = np.cumsum(steps, dtype=np.uint32)
    bases = np.append(np.uint32(0), sums)[np.cumsum(counts) - counts]
    return sums - np.repeat(bases, counts)


_SCORE_COLUMNS = ("topk_ids", "topk_log_probs", "observed_log_probs", "tail_mass")


def _pack_scores(arrays: dict[str, NDArray[Any]], packing: ScorePacking) -> dict[str, NDArray[Any]]:
    counts, ids = arrays["counts"], arrays["topk_ids"]
    assert ((ids >= 0) & (ids < packing.vocab_size)).all(), "ids outside the vocabulary"
    codes = fine_codes_of(arrays["topk_log_probs"]).astype(np.int64)
    steps = _steps(codes, counts)
    if steps.min(initial=0) < 0:  # rounding may put neighbours in the wrong order, a code apart
        assert steps.min() == -1, "topk_log_probs do not descend"
        codes += np.repeat(np.arange(len(counts)) << 16, counts)
        steps = _steps(np.maximum.accumulate(codes) & 0xFFFF, counts)
    with np.errstate(divide="ignore"):
        log_tail = np.log(arrays["tail_mass"])
    rest = {name: values for name, values in arrays.items() if name not in _SCORE_COLUMNS}
    return rest | {
        "topk_ids_low": ids.astype(np.uint8),  # the lowest 8 bits
        "topk_ids_high": ids >> 8,
        "log_prob_steps_low": steps.astype(np.uint8),
        "log_prob_steps_high": (steps >> 8).astype(np.uint8),
        "observed_codes": fine_codes_of(arrays["observed_log_probs"]),
        "tail_codes": fine_codes_of(log_tail),
    }


def _unpack_scores(
    arrays: dict[str, NDArray[Any]], packing: ScorePacking, wrong: Wrong
) -> dict[str, NDArray[Any]]:
    rest = dict(arrays)
    ids = _joined(rest, "topk_ids")
    if ids.max(initial=0) >= packing.vocab_size:
        place = int(np.argmax(ids >= packing.vocab_size))
        raise wrong("entry", place, "topk_ids_high leads outside the vocabulary")
    counts = rest["counts"].astype(np.int64)
    codes = _added_up(_joined(rest, "log_prob_steps"), counts)
    observed, tail = rest.pop("observed_codes"), rest.pop("tail_codes")
    names = ("log_prob_steps_high", "observed_codes", "tail_codes")
    for name, values in zip(names, (codes, observed, tail), strict=True):
        if values.max(initial=0) > FINE_ZERO:
            level = "entry" if values is codes else "position"
            raise wrong(level, int(np.argmax(values > FINE_ZERO)), f"{name} leads to no code")
    codes = codes.astype(np.intp)
    totals = segment_sums(np.take(_FINE_PROBS, codes), counts) + _FINE_PROBS[tail]
    if not (totals > 0).all():
        raise wrong("position", int(np.argmin(totals)), "log_prob_steps_low is not a distribution")
    log_totals = np.log(totals)
    log_probs = np.take(FINE_LEVELS, codes)
    log_probs -= np.repeat(log_totals, counts)
    return rest | {
        "topk_ids": ids.view(np.int32),
        "topk_log_probs": log_probs.astype(np.float32),
        "observed_log_probs": (FINE_LEVELS[observed] - log_totals).astype(np.float32),
        "tail_mass": (_FINE_PROBS[tail] / totals).astype(np.float32),
    }


_FINE_PROBS = np.exp(FINE_LEVELS)


def _joined(columns: dict[str, NDArray[Any]], name: str) -> NDArray[np.uint32]:
    """The values of two columns of bytes, which are taken out."""
    low, high = columns.pop(f"{name}_low"), columns.pop(f"{name}_high")
    values = high.astype(np.uint32)
    values <<= np.uint32(8)
    values |= low
    return values
