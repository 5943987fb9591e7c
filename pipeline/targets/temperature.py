"""A stored distribution at another temperature, with a bound of the error from its tail.

N positions, K entries, V vocabulary.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..format.ragged import segment_sums
from .distributions import Supports, safe_log

Floats = NDArray[np.float64]


def tempered(
    supports: Supports, temperature: float, top_k: int, vocab_size: int
) -> tuple[Supports, Floats]:
    """p^(1/T)/Z, and a bound of its total variation distance from the true distribution, [N].

    Of the M ids in the tail, only the mass ρ is known, and that no probability exceeds c, the
    smaller of ρ and the `top_k`-th entry. Their sum Σ p^(1/T) is between M·(ρ/M)^(1/T), if all are
    equal, and ρ·c^(1/T − 1), if as few as possible have mass. The tail mass is the middle of the
    two results; the bound is half their distance, 0 for an empty tail.
    """
    power = 1 / temperature
    log_probs = power * supports.log_probs
    # divided by the highest entry, so that a low temperature does not underflow
    highest = np.repeat(_first(supports, log_probs), supports.counts)
    inside = segment_sums(np.exp(log_probs - highest), supports.counts)
    tails = _tail_sums(supports, power, top_k, vocab_size) / np.exp(_first(supports, log_probs))
    low, high = np.sort(tails / (inside + tails), axis=0)
    tail_mass = (low + high) / 2
    log_norm = np.log(inside) - np.log1p(-tail_mass)
    log_probs = log_probs - highest - np.repeat(log_norm, supports.counts)
    return replace(supports, log_probs=log_probs, tail_mass=tail_mass), (high - low) / 2


def _first(supports: Supports, values: Floats) -> Floats:
    """The value of the first entry of each position, [N]."""
    return values[np.cumsum(supports.counts) - supports.counts]


def _tail_sums(supports: Supports, power: float, top_k: int, vocab_size: int) -> Floats:
    """The bounds of Σ p^power over the tail, [2, N]."""
    mass = supports.tail_mass
    ids = np.maximum(vocab_size - supports.counts, 1)
    starts = np.cumsum(supports.counts) - supports.counts
    last_of_top = starts + np.minimum(top_k, supports.counts) - 1
    log_most = np.minimum(supports.log_probs[last_of_top], safe_log(mass, 0.0))
    log_mean = safe_log(mass) - np.log(ids)
    log_most = np.maximum(log_most, log_mean)  # rounding errors may make the mean larger
    log_alike = np.log(ids) + power * log_mean
    log_few = safe_log(mass) + (power - 1) * log_most
    return np.where(mass > 0, np.exp([log_alike, log_few]), 0.0)
