"""The distributions that scores state: the most probable tokens, and the observed one.

N positions, K entries of all positions end to end.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..format.batches import FlatBatch
from .distributions import LOG_OF_ZERO, Floats, Ints, Supports, normalised, prefix


@dataclass(frozen=True, eq=False)
class TopK:
    """The entries of a batch of scores, and the observed tokens that are not among them.

    The tail of `supports` is the mass of all tokens but the entries and the observed token.
    """

    supports: Supports
    observed_places: Ints  # of the observed tokens that are among the entries
    outside: NDArray[np.bool_]  # [N] whether the observed token is not among them
    outside_ids: NDArray[np.int32]  # of these observed tokens
    outside_log_probs: Floats

    @cached_property
    def with_observed(self) -> Supports:
        """The entries and the observed token."""
        return self._add_observed(self.supports)

    def truncated(self, top_p: float, max_support: int) -> Supports:
        """The same as `truncated` of `with_observed`, with fewer entries to move."""
        kept = prefix(self.supports, self.observed_places, top_p, max_support)
        return normalised(self._add_observed(kept))

    def _add_observed(self, supports: Supports) -> Supports:
        ends = np.cumsum(supports.counts)[self.outside]
        log_probs = self.outside_log_probs
        return Supports(
            supports.counts + self.outside,
            np.insert(supports.ids, ends, self.outside_ids),
            np.insert(supports.log_probs, ends, log_probs),
            supports.tail_mass,
            np.insert(supports.probs, ends, np.exp(log_probs)),
        )


def top_k_of(scores: FlatBatch) -> TopK:
    """The entries of a batch of scores."""
    counts, observed = scores["counts"].astype(np.int64), scores.observed_ids
    log_probs = np.maximum(scores["topk_log_probs"], LOG_OF_ZERO, dtype=np.float64)
    tail_mass = scores["tail_mass"].astype(np.float64)
    supports = Supports(counts, scores["topk_ids"], log_probs, tail_mass)
    places = supports.places_of(observed)
    outside = np.ones(len(counts), bool)
    outside[supports.positions_of(places)] = False
    outside_log_probs = scores["observed_log_probs"][outside].astype(np.float64)
    tail_mass[outside] = np.maximum(tail_mass[outside] - np.exp(outside_log_probs), 0)
    return TopK(supports, places, outside, observed[outside], outside_log_probs)


def known_supports(scores: FlatBatch) -> Supports:
    """The distributions of a batch of scores: their entries and the observed token."""
    return top_k_of(scores).with_observed
