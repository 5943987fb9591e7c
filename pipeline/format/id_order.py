"""Orders the ids of a folder so that the steps between the ranks of a support are short.

Frequent ids come first, in blocks of similar frequency. Within a block, ids that occur at the same
positions stand side by side: digits, names, words that begin a sentence. The order is a chain: each
id is followed by the id that shares most positions with the last few ids of the chain.

It is the same on every machine: counts are integers, and the arithmetic on them rounds the same
everywhere. N positions, S ids at each, K ids at all of them, I listed ids of a block.
"""

import numpy as np
from numpy.typing import NDArray

MOST_LISTED = 4096  # ids; in a small folder, more would take more bytes than they save
_WORTH = 8  # positions of the folder at which an id must occur to save more than it takes
_FIRST_BLOCK = 512  # ids; each block is twice as large as the one before
_FADING = 0.9  # weight of an id of the chain relative to the next one


def rank_order(ids_NS: NDArray[np.int32], share: float) -> tuple[int, ...]:
    """The ids that are worth listing, in the order of their ranks.

    `ids_NS` holds the supports of a sample of positions, padded with −1; `share` is the sample's
    share of the folder's positions.
    """
    times = np.bincount(ids_NS.ravel() + 1)[1:]  # of each id; the padding is dropped
    worth = (times > 0) & (times >= _WORTH * share)
    listed = np.argsort(np.where(worth, -times, 1), kind="stable")[: min(worth.sum(), MOST_LISTED)]
    place_of = np.full(len(times) + 1, -1)  # the last is that of the padding
    place_of[listed] = np.arange(len(listed))
    places_NS = place_of[ids_NS]
    order, start, size = [], 0, _FIRST_BLOCK
    while start < len(listed):
        block = listed[start : start + size]
        positions_K, columns_K = np.nonzero((places_NS >= start) & (places_NS < start + size))
        places_K = places_NS[positions_K, columns_K] - start
        order.append(block[_chain(_together(positions_K, places_K, len(block)), times[block])])
        start, size = start + size, 2 * size
    return tuple(np.concatenate(order).tolist()) if order else ()


def _together(
    positions_K: NDArray[np.int64], places_K: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """The number of positions that each two ids share, [I, I]; `positions_K` ascend."""
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
    """Order the ids of a block as a chain, from the most frequent id, which is at 0."""
    alike_II = together_II / (times_I[:, None] + times_I - together_II)  # Jaccard's index
    order = np.zeros(len(times_I), np.int64)
    recent_I = np.zeros(len(times_I))
    for place in range(1, len(order)):
        recent_I[order[place - 1]] = -np.inf  # and stays so: it is in the chain
        recent_I *= _FADING
        recent_I += alike_II[order[place - 1]]
        order[place] = np.argmax(recent_I)
    return order
