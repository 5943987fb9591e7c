"""Quantiles of a stream of numbers, in one pass and bounded memory, whatever its order."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.int64]

MOST_DISTINCT = 2**22  # numbers kept apart: 64 MiB


class OrderStatistics:
    """Counts numbers by value, exactly up to `most_distinct` different ones.

    Beyond that neighbouring values are counted as one: numbers are kept to ever fewer bits of
    their mantissa, just as few as it takes. How few depends on the numbers alone, not on their
    order or on how they were cut into batches; `relative_error` says what it comes to.
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
        """Count some numbers, none of them NaN or infinite."""
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
        """How far off a number may be, relative to itself: 0 while all are kept apart."""
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
    """Each different key once, in order, and how often it occurs."""
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _ordered(values: Floats) -> Keys:
    """Integers in the order of the numbers: their bits, turned round for the negative ones."""
    bits = (values.astype(np.float64) + 0.0).view(np.int64)  # + 0.0 makes −0 a 0
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)


def _from_ordered(key: np.int64) -> float:
    bits = np.array([key ^ np.int64(2**63 - 1) if key < 0 else key], np.int64)
    return float(bits.view(np.float64)[0])
