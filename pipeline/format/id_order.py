"""An order of a folder's ids in which the supports take short steps from one rank to the next.

Frequent ids come first, in blocks of like frequency, and within a block those that stand at the
same positions come side by side: digits, names, ways to begin a sentence. The order is a chain:
each id is followed by the one that shares most of its positions with the last few of the chain.

It is the same on every machine: whole numbers are counted, and what is computed of them rounds the
same everywhere. N positions, S ids at each, K ids at all of them, I listed ids of a block.
"""

import numpy as np
from numpy.typing import NDArray

MOST_LISTED = 4096  # ids: more would take more room in a small folder than they save
_WORTH = 8  # positions of the folder from which on an id saves more than its name takes
_FIRST_BLOCK = 512  # ids; each block is twice as large as the one before
_FADING = 0.9  # weight of each id of the chain against that of the next


def rank_order(ids_NS: NDArray[np.int32], share: float) -> tuple[int, ...]:
    """The ids worth a rank of their own, in the order of their ranks.

    `ids_NS` are the supports of a sample of positions, −1 where there are fewer; `share` is that of
    the sample in the folder.
    """
    ids, places, times = np.unique(ids_NS, return_inverse=True, return_counts=True)
    worth = (ids >= 0) & (times >= _WORTH * share)
    listed = np.argsort(np.where(worth, -times, 1), kind="stable")[: min(worth.sum(), MOST_LISTED)]
    place_of = np.full(len(ids), -1)
    place_of[listed] = np.arange(len(listed))
    places_NS = place_of[places].reshape(ids_NS.shape)
    order, start, size = [], 0, _FIRST_BLOCK
    while start < len(listed):
        block = listed[start : start + size]
        positions_K, columns_K = np.nonzero((places_NS >= start) & (places_NS < start + size))
        places_K = places_NS[positions_K, columns_K] - start
        order.append(block[_chain(_together(positions_K, places_K, len(block)), times[block])])
        start, size = start + size, 2 * size
    return tuple(ids[np.concatenate(order)].tolist()) if order else ()


def _together(
    positions_K: NDArray[np.int64], places_K: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """At how many positions each two stand, [I, I]; `positions_K` ascend."""
    together = np.zeros(size * size, np.int64)
    left = np.arange(len(positions_K))
    for shift in range(1, len(positions_K)):
        left = left[: np.searchsorted(left, len(positions_K) - shift)]
        left = left[positions_K[left] == positions_K[left + shift]]
        if not len(left):
            break
        np.add.at(together, places_K[left] * size + places_K[left + shift], 1)
    together_II = together.reshape(size, size)
    return together_II + together_II.T


def _chain(together_II: NDArray[np.int64], times_I: NDArray[np.integer]) -> NDArray[np.int64]:
    """An order from the most frequent on, which is at 0."""
    alike_II = together_II / (times_I[:, None] + times_I - together_II)  # Jaccard's index
    order = np.zeros(len(times_I), np.int64)
    is_left = np.ones(len(times_I), bool)
    recent_I = np.zeros(len(times_I))
    for place in range(1, len(order)):
        is_left[order[place - 1]] = False
        recent_I = recent_I * _FADING + alike_II[order[place - 1]]
        order[place] = np.argmax(np.where(is_left, recent_I, -1.0))
    return order
