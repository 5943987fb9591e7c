"""Statistics of two models judged on the same items, and of a method over its seeds.

S seeds, I items. All of plain numpy and the standard library.
"""

from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """How often only the first and only the second is right, and the exact two-sided p-value.

    Over pairs of any shape; those that are alike say nothing (McNemar 1947, its binomial form).
    """
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    discordant = only_first + only_second
    extreme = sum(comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return only_first, only_second, min(1.0, 2 * extreme / 2**discordant)


def difference_interval(
    first_SI: NDArray[np.bool_], second_SI: NDArray[np.bool_], share: float = 0.95
) -> tuple[float, float]:
    """A bootstrap interval of the difference of accuracies, first − second.

    Seeds and items are drawn again, each with all that belongs to it, so that neither an easy item
    nor a lucky seed counts for more than one.
    """
    difference_SI = first_SI.astype(np.float64) - second_SI
    seeds, items = difference_SI.shape
    rng = np.random.default_rng(0)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    item_weights = rng.multinomial(items, np.full(items, 1 / items), RESAMPLES) / items
    means = ((seed_weights @ difference_SI) * item_weights).sum(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean; NaN where one is constant."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (first, second)]
    norm = sqrt(float((ranks[0] ** 2).sum()) * float((ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / norm if norm else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values[:, None] > values).sum(1)
    same = (values[:, None] == values).sum(1)
    return below + (same - 1) / 2
