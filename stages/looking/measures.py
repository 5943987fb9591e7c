"""The measures of a supervised token, for `qpipe inspect` and `qpipe report`.

N positions, K entries of ragged supports. y is the observed token, b the base prior, q a teacher,
Q = γ·δ_y + (1 − γ)·π̃ the target. "Own" is the folder's distribution: b for scores, Q for targets.
The mass outside a support counts as one outcome, so an entropy or a divergence is a lower bound.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...pipeline.format.arrow import segment_sums
from ...pipeline.format.batches import FlatBatch
from ...pipeline.targets.distributions import (
    LOG_OF_ZERO,
    Supports,
    common_divergence,
    common_supports,
    most_probable_first,
    safe_log,
)

Floats = NDArray[np.float64]
Scale = Literal["share", "distance", "nats", "rank", "difference"]  # of the colours of values


@dataclass(frozen=True, slots=True)
class Measure:
    """One number per supervised token, and the bins of its histogram: [edge, next edge).

    If `is_open`, the last bin has no upper edge. `labels` name bins of unequal width.
    """

    name: str
    title: str
    words: str
    scale: Scale
    edges: tuple[float, ...]
    labels: tuple[str, ...] = ()
    is_open: bool = False

    def histogram(self, values_N: Floats) -> NDArray[np.int64]:
        """The number of values in each bin; values outside count in the outermost bins."""
        bins_N = np.searchsorted(self.edges, values_N + 1e-9, side="right") - 1
        return np.bincount(
            np.clip(bins_N, 0, len(self.edges) - 2), minlength=len(self.edges) - 1
        ).astype(np.int64)


_SHARES = tuple(round(0.05 * i, 2) for i in range(21))
_WEIGHTS = tuple(round(0.1 * i, 1) for i in range(21))
_NATS = tuple(round(0.25 * i, 2) for i in range(25))
_RANKS = (1, 2, 3, 4, 6, 11, 101, 1001, 10**9)
_RANK_LABELS = ("1", "2", "3", "4–5", "6–10", "11–100", "101–1k", "> 1k")
_COUNTS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 10**9)
_COUNT_LABELS = ("1", "2", "3–4", "5–8", "9–16", "17–32", "33–64", "65–128", "> 128")
_KEPT = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_KEPT_LABELS = tuple(f"{low:g}–{high:g}" for low, high in pairwise(_KEPT))
_DIFFERENCES = tuple(round(-1 + 0.1 * i, 1) for i in range(21))


def _share(name: str, title: str, words: str) -> Measure:
    return Measure(name, title, words, "share", _SHARES)


def _nats(name: str, title: str, words: str) -> Measure:
    return Measure(name, title, words, "nats", _NATS, is_open=True)


def _rank(name: str, title: str, words: str) -> Measure:
    return Measure(name, title, words, "rank", _RANKS, _RANK_LABELS)


MEASURES = {
    measure.name: measure
    for measure in (
        _share("trust", "Trust γ", "how far the target trusts the observed token"),
        Measure(  # at most about 1 for most methods; weights of demonstrations may be larger
            "weight", "Weight", "the factor of the token's loss", "share", _WEIGHTS, is_open=True
        ),
        _share("target", "Target Q(y)", "the target's probability of the observed token"),
        _share("base", "Base b(y)", "the base model's probability of the observed token"),
        _share("teacher", "Teacher q(y)", "the teacher's probability of the observed token"),
        _share("other", "Other's y", "the other folder's probability of the observed token"),
        Measure(
            "gain",
            "Target − base",
            "Q(y) − b(y): what the target adds to the base",
            "difference",
            _DIFFERENCES,
        ),
        _nats("nll", "Loss", "−log of the folder's own probability of the observed token, nats"),
        _nats("entropy", "Entropy", "of the folder's own distribution, nats, at least"),
        _rank("rank", "Rank", "of the observed token in the folder's own distribution"),
        _nats("base-nll", "Base loss", "−log b(y), nats"),
        _nats("base-entropy", "Base entropy", "of the base prior, nats, at least"),
        _rank("base-rank", "Base rank", "of the observed token under the base"),
        Measure(
            "support", "Support", "entries that are stored", "rank", _COUNTS, labels=_COUNT_LABELS
        ),
        Measure(
            "kept",
            "Kept mass",
            "probability that the stored entries hold",
            "share",
            _KEPT,
            labels=_KEPT_LABELS,
        ),
        _nats("kl", "KL", "from this distribution to the other, nats, at least"),
        Measure(
            "tv", "Total variation", "between the two distributions, at least", "distance", _SHARES
        ),
    )
}


def target_supports(targets: FlatBatch) -> Supports:
    """The targets Q of a batch, most probable entries first."""
    counts = targets["counts"].astype(np.int64)
    trust = targets["trust"].astype(np.float64)
    trust_K = np.repeat(trust, counts)
    is_observed = targets["support_ids"] == np.repeat(targets.observed_ids, counts)
    probs = (1 - trust_K) * targets["support_probs"] + np.where(is_observed, trust_K, 0.0)
    tail_mass = (1 - trust) * targets["tail_mass"]
    log_probs = np.minimum(safe_log(probs, LOG_OF_ZERO), 0.0)  # rounding may exceed 0
    return most_probable_first(Supports(counts, targets["support_ids"], log_probs, tail_mass))


def observed_log_prob(supports: Supports, observed_ids: NDArray[np.int32]) -> Floats:
    """The log-probability of the observed token, which every support holds, [N]."""
    is_observed = supports.ids == observed_ids[supports.position_of]
    return segment_sums(np.where(is_observed, supports.log_probs, 0.0), supports.counts)


def entropy(supports: Supports) -> Floats:
    """The entropy in nats at each position, with the tail as one outcome, [N]."""
    inner = segment_sums(supports.probs * supports.log_probs, supports.counts)
    return np.maximum(-inner - supports.tail_mass * safe_log(supports.tail_mass, 0.0), 0.0)


def observed_rank(supports: Supports, observed_ids: NDArray[np.int32]) -> Floats:
    """The rank of the observed token among the stored entries, [N]; 1 is the mode."""
    own_K = np.repeat(observed_log_prob(supports, observed_ids), supports.counts)
    return 1.0 + segment_sums((supports.log_probs > own_K).astype(np.int64), supports.counts)


def divergence(one: Supports, other: Supports) -> Floats:
    """KL(one ‖ other) in nats on the ids that both hold, the rest of each as one outcome, [N]."""
    return np.maximum(common_divergence(common_supports(other, one)), 0.0)


def total_variation(one: Supports, other: Supports) -> Floats:
    """Half the sum of absolute differences, the tails as one outcome, [N]."""
    common, others = common_supports(one, other)
    inner = np.abs(common.probs - others.probs)
    tails = np.abs(common.tail_mass - others.tail_mass)
    return (segment_sums(inner, common.counts) + tails) / 2


def of_targets(batch: FlatBatch, own: Supports) -> dict[str, Floats]:
    """The measures of a batch of targets alone, [N] each."""
    log_prob = observed_log_prob(own, batch.observed_ids)
    return {
        "trust": batch["trust"].astype(np.float64),
        "weight": batch["weights"].astype(np.float64),
        "target": np.exp(log_prob),
        "nll": -log_prob,
        "entropy": entropy(own),
        "rank": observed_rank(own, batch.observed_ids),
        "support": batch["counts"].astype(np.float64),
        "kept": 1 - batch["tail_mass"].astype(np.float64),
    }


def of_scores(batch: FlatBatch, own: Supports) -> dict[str, Floats]:
    """The measures of a batch of scores alone, [N] each."""
    log_prob = np.minimum(batch["observed_log_probs"].astype(np.float64), 0.0)
    return {
        "base": np.exp(log_prob),
        "nll": -log_prob,
        "entropy": entropy(own),
        "rank": batch["observed_ranks"].astype(np.float64),
        "support": batch["counts"].astype(np.float64),
        "kept": 1 - batch["tail_mass"].astype(np.float64),
    }
