"""Ragged distributions over the vocabulary: entries at each position, and the mass of the tail.

N positions, K entries of all positions end to end. All values are float64; targets are rounded
once, when they are stored.
"""

from dataclasses import InitVar, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.ragged import padded, segment_sums, unpadded
from ..methods import rules

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LOG_OF_ZERO = -1e4  # replaces log 0 = −inf in scores: its exp is 0, and 0 times it is not NaN
SMALLEST_TAIL = float(np.finfo(np.float32).smallest_normal)  # replaces a tail mass of 0 in logs


@dataclass(frozen=True, eq=False)
class Supports:
    """`counts[n]` entries at position n, most probable first; an added observed token comes last.

    `tail_mass` is added up itself: 1 minus the sum of the entries would lose precision.
    """

    counts: Ints  # [N]
    ids: NDArray[np.int32]  # [K]
    log_probs: Floats  # [K]
    tail_mass: Floats  # [N]
    known_probs: InitVar[Floats | None] = None  # the exponentials of `log_probs`, if at hand

    def __post_init__(self, known_probs: Floats | None) -> None:
        if known_probs is not None:
            known_probs.flags.writeable = False
            self.__dict__["probs"] = known_probs

    @cached_property
    def probs(self) -> Floats:
        """The probabilities of the entries, [K]; kept, and not to be changed."""
        probs = np.exp(self.log_probs)
        probs.flags.writeable = False
        return probs

    @property
    def position_of(self) -> Ints:
        """The position of each entry, [K]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def places_of(self, ids_N: NDArray[np.int32]) -> Ints:
        """The places of the entries with the id that is given for their position, ascending."""
        width = len(self.ids) // max(len(self.counts), 1)
        if (self.counts == width).all():  # without an array of the repeated ids
            return np.flatnonzero(self.ids.reshape(len(self.counts), width) == ids_N[:, None])
        return np.flatnonzero(self.ids == np.repeat(ids_N, self.counts))

    def positions_of(self, places: Ints) -> Ints:
        """The positions of some entries."""
        return np.searchsorted(np.cumsum(self.counts), places, side="right")

    @property
    def ranks(self) -> Ints:
        """The place of each entry at its position, from 0, [K]."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(len(self.ids)) - np.repeat(starts, self.counts)

    @property
    def log_tail(self) -> Floats:
        """log of the tail mass, −inf for 0, [N]."""
        return safe_log(self.tail_mass)


def within(supports: Supports, vocab_size: int) -> Supports:
    """Move the ids from `vocab_size` on to the tail."""
    inside = supports.ids < vocab_size
    if inside.all():
        return supports
    return Supports(
        np.bincount(supports.position_of[inside], minlength=len(supports.counts)),
        supports.ids[inside],
        supports.log_probs[inside],
        _tail_without(supports, np.flatnonzero(inside)),
    )


def observed_only(observed_ids: NDArray[np.int32], log_probs: Floats) -> Supports:
    """Only the observed token with its probability; the rest is in the tail."""
    counts = np.ones(len(observed_ids), np.int64)
    return Supports(counts, observed_ids, log_probs, 0 - np.expm1(log_probs))  # never -0.0


def uniform_on(supports: Supports, vocab_size: int) -> Supports:
    """The uniform distribution, on the ids of other supports."""
    log_probs = np.full(len(supports.ids), -np.log(vocab_size))
    return replace(supports, log_probs=log_probs, tail_mass=1 - supports.counts / vocab_size)


def truncated(
    supports: Supports, observed_ids: NDArray[np.int32], top_p: float, max_support: int
) -> Supports:
    """Keep the observed token and the smallest prefix of mass `top_p`, at most `max_support` ids.

    The other entries move to the tail; support and tail are then scaled to add up to 1.
    """
    return normalised(prefix(supports, supports.places_of(observed_ids), top_p, max_support))


def prefix(supports: Supports, places: Ints, top_p: float, max_support: int) -> Supports:
    """Keep the smallest prefix of mass `top_p`, at most `max_support` ids, and some more entries.

    `places` are theirs. The other entries move to the tail.
    """
    probs, counts = supports.probs, supports.counts
    keep = _in_prefix(counts, probs, top_p, max_support)
    keep[places] = True
    kept = np.flatnonzero(keep)
    return Supports(
        segment_sums(keep.astype(np.int64), counts),
        supports.ids[kept],
        supports.log_probs[kept],
        supports.tail_mass + segment_sums(probs * ~keep, counts),
        probs[kept],
    )


def normalised(supports: Supports) -> Supports:
    """Scale entries and tail to add up to 1."""
    counts, probs = supports.counts, supports.probs
    total = segment_sums(probs, counts) + supports.tail_mass
    return Supports(
        counts,
        supports.ids,
        supports.log_probs - np.repeat(np.log(total), counts),
        supports.tail_mass / total,
        probs / np.repeat(total, counts),
    )


class SharedSupport(NamedTuple):
    """Two distributions with the same counts and ids."""

    first: Supports
    second: Supports


def common_supports(one: Supports, other: Supports) -> SharedSupport:
    """Two distributions on their common ids, in the order of the first; the rest is in tails."""
    place, other_place = _matches(one, other)
    is_kept = np.zeros(len(one.ids), np.int64)
    is_kept[place] = 1
    counts, ids = segment_sums(is_kept, one.counts), one.ids[place]
    return SharedSupport(
        _part(one, counts, ids, place),
        _part(other, counts, ids, other_place),
    )


def mixture(common: SharedSupport, eta: float, alpha: float = 1.0) -> Supports:
    """`rules.mixture` on the common support, with the tails as one outcome; q is the second."""
    p, q = common
    mixed_NS, mixed_tail_N = rules.mixture(
        padded(p.counts, p.log_probs, -np.inf),
        p.log_tail,
        padded(q.counts, q.log_probs, -np.inf),
        q.log_tail,
        eta,
        alpha,
    )
    return replace(p, log_probs=unpadded(p.counts, mixed_NS), tail_mass=np.exp(mixed_tail_N))


def contrasted(common: SharedSupport, alpha: float) -> Supports:
    """∝ q/p where q ≥ alpha·max q, 0 elsewhere; q is the second."""
    p, q = common
    ratio_NS = rules.contrast(
        padded(q.counts, q.log_probs, -np.inf), padded(p.counts, p.log_probs, 0.0), alpha
    )
    no_tail = np.zeros(len(p.counts))
    return replace(p, log_probs=unpadded(p.counts, ratio_NS), tail_mass=no_tail)


def most_probable_first(supports: Supports) -> Supports:
    """Sort the entries; equal ones keep their order."""
    counts = supports.counts
    log_probs_NS = padded(counts, supports.log_probs, -np.inf)
    order_NS = _descending(log_probs_NS)
    ids_NS = padded(counts, supports.ids, -1)
    return replace(
        supports,
        ids=unpadded(counts, np.take_along_axis(ids_NS, order_NS, axis=1)),
        log_probs=unpadded(counts, np.take_along_axis(log_probs_NS, order_NS, axis=1)),
    )


def common_divergence(common: SharedSupport) -> Floats:
    """KL(second ‖ first), [N], with each tail as one outcome: a lower bound."""
    p, q = common
    inner = segment_sums(q.probs * (q.log_probs - p.log_probs), p.counts)
    log_tail = np.log(np.maximum(p.tail_mass, SMALLEST_TAIL))
    return inner + q.tail_mass * (safe_log(q.tail_mass, 0.0) - log_tail)


def concentration(supports: Supports) -> Floats:
    """Σ p² of the entries, [N].

    A lower bound: the tail adds its mass times the probability of the last entry at most.
    """
    return segment_sums(np.exp(2 * supports.log_probs), supports.counts)


def expected_rank(supports: Supports) -> Floats:
    """The mean rank, [N]: a lower bound, which gives the tail the rank of the last entry."""
    inside = segment_sums((supports.ranks + 1) * supports.probs, supports.counts)
    return inside + supports.counts * supports.tail_mass


def mass_up_to(supports: Supports, observed: NDArray[np.int32]) -> Floats:
    """The mass of the observed token, of all less probable entries and of the tail, [N].

    An upper bound if the observed token is not among the most probable ones.
    """
    is_observed = supports.ids == observed[supports.position_of]
    lower = supports.log_probs < _of_observed(supports, observed)
    counted = np.where(lower | is_observed, supports.probs, 0.0)
    return segment_sums(counted, supports.counts) + supports.tail_mass


def _of_observed(supports: Supports, observed: NDArray[np.int32]) -> Floats:
    """The log-probability of the observed token, at each entry, [K]."""
    is_observed = supports.ids == observed[supports.position_of]
    return np.repeat(supports.log_probs[is_observed], supports.counts)


def safe_log(values: Floats, of_zero: float = -np.inf) -> Floats:
    """log of values ≥ 0, without a warning for 0."""
    positive = values > 0
    return np.where(positive, np.log(np.where(positive, values, 1.0)), of_zero)


def _in_prefix(counts: Ints, probs: Floats, top_p: float, most: int) -> NDArray[np.bool_]:
    """Whether an entry is in the smallest prefix of mass `top_p`, and in the first `most`, [K].

    Masses are added up row by row, so that they do not depend on the other rows of the batch.
    """
    probs_NS = padded(counts, probs, 0.0)
    is_in_NS = probs_NS > 0
    is_in_NS[:, most:] = False
    if top_p < 1:
        is_in_NS[:, 1:] &= np.cumsum(probs_NS[:, :-1], axis=1) < top_p
    return unpadded(counts, is_in_NS)


def _matches(one: Supports, other: Supports) -> tuple[Ints, Ints]:
    """The places of entries that have the same id at the same position, in each, [K].

    Sorts the ids of both together in a row for each position: a common id then stands there twice.
    """
    split = int(one.counts.max(initial=1))
    bits = (split + int(other.counts.max(initial=1)) - 1).bit_length()  # of a column's number
    largest = max(one.ids.max(initial=0), other.ids.max(initial=0))
    ids_NW = np.concatenate(
        [padded(one.counts, one.ids, -1), padded(other.counts, other.ids, -1)],
        axis=1,
        dtype=np.int32 if largest < 1 << (31 - bits) else np.int64,
    )
    keys_NW = ids_NW << bits | np.arange(ids_NW.shape[1], dtype=ids_NW.dtype)
    keys_NW.sort(axis=1)
    np.right_shift(keys_NW, bits, out=ids_NW)
    found_NW = (ids_NW[:, 1:] == ids_NW[:, :-1]) & (ids_NW[:, 1:] >= 0)
    keys_NW &= (1 << bits) - 1  # now the columns
    found = np.count_nonzero(found_NW, axis=1)
    starts, other_starts = (np.cumsum(each.counts) - each.counts for each in (one, other))
    other_of = np.full(len(one.ids), -1)
    other_of[np.repeat(starts, found) + keys_NW[:, :-1][found_NW]] = (
        np.repeat(other_starts - split, found) + keys_NW[:, 1:][found_NW]
    )
    place = np.flatnonzero(other_of >= 0)
    return place, other_of[place]


def _descending(log_probs_NS: Floats) -> Ints:
    """The columns of log-probabilities ≤ 0 in descending order; equal ones keep theirs, [N, S].

    The bits of such numbers, as integers, grow with their absolute value. The column replaces the
    lowest bits, so numbers that agree in their first 52 − log₂ S bits count as equal. Sorting
    integers is three times as fast as a stable sort of places.
    """
    column_bits = max(log_probs_NS.shape[1] - 1, 1).bit_length()
    keys_NS = np.abs(log_probs_NS).view(np.int64) >> column_bits << column_bits
    keys_NS |= np.arange(log_probs_NS.shape[1])
    keys_NS.sort(axis=1)
    return keys_NS & ((1 << column_bits) - 1)


def _part(whole: Supports, counts: Ints, ids: NDArray[np.int32], kept: Ints) -> Supports:
    """The entries at some places, with these counts and ids; the rest is in the tail."""
    tail_mass = _tail_without(whole, kept)
    return Supports(counts, ids, whole.log_probs[kept], tail_mass, whole.probs[kept])


def _tail_without(supports: Supports, kept: Ints) -> Floats:
    """The tail mass of a distribution that keeps only some entries."""
    probs = supports.probs.copy()
    probs[kept] = 0
    return supports.tail_mass + segment_sums(probs, supports.counts)
