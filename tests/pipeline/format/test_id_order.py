"""The order of ids that makes the steps between ranks short."""

import numpy as np
from numpy.typing import NDArray
from qpipe.pipeline.format.id_order import rank_order

Ids = NDArray[np.int32]
TIMES = 8  # that an id must stand in a folder to be listed


def positions(*supports: tuple[list[int], int]) -> Ids:
    """Supports, each as often as is said, padded."""
    rows = [ids for ids, times in supports for _ in range(times)]
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


def test_ids_that_stand_together_come_side_by_side() -> None:
    digits, names = [40, 7, 21], [90, 3, 55]
    ids_NS = positions((digits, 30), (names, 20), ([40, 90], 5), ([7, 21], 3))
    # 40, in 35 positions, leads; 7 and 21 were with it in 30 of them, and are as frequent
    assert rank_order(ids_NS, 1.0) == (40, 7, 21, 90, 3, 55)


def test_what_is_rare_has_no_rank_of_its_own() -> None:
    ids_NS = positions(([1, 2], TIMES - 1), ([1, 3], 1), ([4], TIMES))
    assert rank_order(ids_NS, 1.0) == (1, 4)
    # of a folder that is twice as large, what stands here four times may stand there eight times
    assert set(rank_order(ids_NS, 0.5)) == {1, 2, 4}
    assert rank_order(np.full((3, 2), -1, np.int32), 1.0) == ()
    assert rank_order(np.empty((0, 2), np.int32), 0.0) == ()


def test_frequent_ids_come_before_rare_ones_beyond_the_first_block() -> None:
    """700 ids, id i in 1000 − i positions, alone: 512 of them make the first block."""
    ids_NS = np.concatenate([np.full((1000 - each, 1), each, np.int32) for each in range(700)])
    order = rank_order(ids_NS, 1.0)
    assert sorted(order[:512]) == list(range(512))
    assert sorted(order[512:]) == list(range(512, 700))


def test_steps_are_shorter_than_in_the_order_of_frequency() -> None:
    """Ten topics of forty words each; a position takes eight of one topic."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(400)
    topics = rng.integers(0, 10, 4000)
    ids_NS = np.stack([shuffled[40 * t + rng.permutation(40)[:8]] for t in topics]).astype(np.int32)

    def mean_step(order: NDArray[np.int64]) -> float:
        rank_of = np.empty(400, np.int64)
        rank_of[order] = np.arange(400)
        return float(np.diff(np.sort(rank_of[ids_NS], axis=1), axis=1).mean())

    by_frequency = np.argsort(-np.bincount(ids_NS.ravel()))
    assert mean_step(np.array(rank_order(ids_NS, 1.0))) < 6  # 41 / 9 within a topic
    assert mean_step(by_frequency) > 40
