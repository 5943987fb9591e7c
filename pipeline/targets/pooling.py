"""Several teachers as one distribution: a weighted mean.

An id may be known of some teachers and not of others, for which its probability is somewhere in the
tail. In the arithmetic mean such a teacher adds nothing to the id, and its mass stays in the tail:
every entry is a lower bound, and entries and tail add up to 1. The geometric mean, ∝ Π q_i^w_i, is
over the ids that all teachers know, with the tails as one outcome.

N positions, K entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from .distributions import Supports, common_supports, most_probable_first, normalised

Mean = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """The weights of the teachers, which add up to 1, and the mean."""

    weights: tuple[float, ...]
    mean: Mean = "arithmetic"


def pooled(teachers: Sequence[Supports], pooling: Pooling) -> Supports:
    """The mean of the teachers' distributions at each position."""
    if pooling.mean == "geometric":
        return _geometric(teachers, pooling.weights)
    return _arithmetic(teachers, pooling.weights)


def _arithmetic(teachers: Sequence[Supports], weights: Sequence[float]) -> Supports:
    pairs = list(zip(teachers, weights, strict=True))
    position = np.concatenate([each.position_of for each in teachers])
    ids = np.concatenate([each.ids for each in teachers])
    probs = np.concatenate([weight * each.probs for each, weight in pairs])
    # the entries of a position side by side, each id once
    keys, place = np.unique(position << 32 | ids, return_inverse=True)
    with np.errstate(divide="ignore"):  # a token may have no probability at all
        log_probs = np.log(np.bincount(place, probs, len(keys)))
    united = Supports(
        np.bincount(keys >> 32, minlength=len(teachers[0].counts)),
        (keys & 0xFFFFFFFF).astype(np.int32),
        log_probs,
        np.sum([weight * each.tail_mass for each, weight in pairs], axis=0),
    )
    return most_probable_first(united)


def _geometric(teachers: Sequence[Supports], weights: Sequence[float]) -> Supports:
    known = reduce(lambda one, other: common_supports(one, other).first, teachers)
    pairs = [
        (common_supports(known, each).second, weight)
        for each, weight in zip(teachers, weights, strict=True)
    ]
    log_probs = np.sum([weight * each.log_probs for each, weight in pairs], axis=0)
    log_tail = np.sum([weight * each.log_tail for each, weight in pairs], axis=0)
    mixed = Supports(known.counts, known.ids, log_probs, np.exp(log_tail))
    return most_probable_first(normalised(mixed))
