"""A stored distribution at another temperature, and how far off it may be for its unknown tail.

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
    """p^(1/T)/Z, and a bound of its total variation distance from the true one, [N].

    Of the M ids in the tail only their mass ρ is known, and that none is more probable than the
    `top_k`-th entry, or than ρ: c. Their sum Σ p^(1/T) then lies between M·(ρ/M)^(1/T), all
    alike, and ρ·c^(1/T − 1), as few as possible. The tail's mass is taken in the middle of what the
    two give; the bound is half of their distance: 0 where there is no tail.
    """
    power = 1 / temperature
    log_probs = power * supports.log_probs
    # scaled by the highest entry's, so that a low temperature does not underflow
    highest = np.repeat(_first(supports, log_probs), supports.counts)
    inside = segment_sums(np.exp(log_probs - highest), supports.counts)
    tails = _tail_sums(supports, power, top_k, vocab_size) / np.exp(_first(supports, log_probs))
    low, high = np.sort(tails / (inside + tails), axis=0)
    tail_mass = (low + high) / 2
    log_norm = np.log(inside) - np.log1p(-tail_mass)
    log_probs = log_probs - highest - np.repeat(log_norm, supports.counts)
    return replace(supports, log_probs=log_probs, tail_mass=tail_mass), (high - low) / 2


def _first(supports: Supports, values: Floats) -> Floats:
    """The value of each position's first entry, [N]."""
    return values[np.cumsum(supports.counts) - supports.counts]


def _tail_sums(supports: Supports, power: float, top_k: int, vocab_size: int) -> Floats:
    """The two extremes of Σ p^power over the tail, [2, N]."""
    mass = supports.tail_mass
    ids = np.maximum(vocab_size - supports.counts, 1)
    starts = np.cumsum(supports.counts) - supports.counts
    last_of_top = starts + np.minimum(top_k, supports.counts) - 1
    log_most = np.minimum(supports.log_probs[last_of_top], safe_log(mass, 0.0))
    log_mean = safe_log(mass) - np.log(ids)
    log_most = np.maximum(log_most, log_mean)  # a tail of rounding errors alone may be above it
    log_alike = np.log(ids) + power * log_mean
    log_few = safe_log(mass) + (power - 1) * log_most
    return np.where(mass > 0, np.exp([log_alike, log_few]), 0.0)
