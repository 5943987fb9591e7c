"""Order statistics of a stream of numbers, in one pass and bounded memory."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.int64]

MOST_DISTINCT = 2**22  # different numbers that are kept: 64 MiB


class OrderStatistics:
    """Counts numbers by value, exactly for up to `most_distinct` different ones.

    Beyond that, neighbouring values are counted as one: low bits of the mantissa are dropped, as
    few as necessary. The result depends on the numbers alone, not on their order or batches;
    `relative_error` bounds its error.
    """

    def __init__(self, most_distinct: int = MOST_DISTINCT) -> None:
        self.most_distinct = most_distinct
        self.count = 0
        self._keys: Keys = np.empty(0, np.int64)
        self._counts: Keys = np.empty(0, np.int64)
        self._dropped_bits = 0
        self._waiting: list[Keys] = []
        self._waiting_size = 0

    def add(self, values: Floats) -> None:
        """Count finite numbers."""
        self._waiting.append(_ordered(values) >> self._dropped_bits)
        self._waiting_size += len(values)
        self.count += len(values)
        if self._waiting_size >= self.most_distinct:
            self._merge()

    def at(self, place: int) -> float:
        """The number at a place in ascending order, counted from 0."""
        self._merge()
        key = self._keys[np.searchsorted(np.cumsum(self._counts), place, side="right")]
        middle = (1 << self._dropped_bits) >> 1
        return _from_ordered((key << self._dropped_bits) + middle)

    @property
    def relative_error(self) -> float:
        """The relative error of a number; 0 while no bits are dropped."""
        self._merge()
        return 0.0 if self._dropped_bits == 0 else 2.0 ** (self._dropped_bits - 53)

    def _merge(self) -> None:
        if self._waiting_size:
            keys = np.concatenate([self._keys, *self._waiting])
            ones = np.ones(self._waiting_size, np.int64)
            self._waiting, self._waiting_size = [], 0
            self._keys, self._counts = _count(keys, np.concatenate([self._counts, ones]))
        while len(self._keys) > self.most_distinct:
            self._dropped_bits += 1
            self._keys, self._counts = _count(self._keys >> 1, self._counts)


def _count(keys: Keys, counts: Keys) -> tuple[Keys, Keys]:
    """The different keys, ascending, and their counts."""
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _ordered(values: Floats) -> Keys:
    """Integers in the order of the numbers: their bits, inverted for negative numbers."""
    bits = (values.astype(np.float64) + 0.0).view(np.int64)  # + 0.0 makes −0 a 0
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)


def _from_ordered(key: np.int64) -> float:
    bits = np.array([key ^ np.int64(2**63 - 1) if key < 0 else key], np.int64)
    return float(bits.view(np.float64)[0])
