"""Several streams as one, each with a share of the samples.

The stream of the k-th sample depends on k and the weights alone, so the only state of a mixture is
the number of samples consumed, as for a single stream. Each stream has its own epochs: with weights
other than their sizes, an epoch of the mixture, which has as many samples as the streams in total,
repeats examples of one stream and leaves out some of another. After any number of samples, the
samples of a stream are within one of its exact share: Balinski and Young's quota method (The quota
method of apportionment, 1975). In proportion to their sizes, the pattern may repeat only after more
than `LONGEST_PERIOD` samples; then each stream's samples are spread evenly, which is within half a
sample and half the number of streams of the exact share.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from math import gcd
from typing import Any

import numpy as np

from ...pipeline.format.records import Ints, TargetExample
from .shares import LONGEST_PERIOD, shares_of
from .stream import TargetStream


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Streams, and the stream of each sample of a period; see `mix`."""

    streams: tuple[TargetStream, ...]
    shares: tuple[int, ...]  # samples a period
    turns: Ints  # [sum(shares)] the stream
    places: Ints  # [sum(shares)] the number of earlier samples of that stream in the period

    def __len__(self) -> int:
        """Samples an epoch: as many as the streams have together, whatever their shares."""
        return sum(map(len, self.streams))

    def samples(self, seed: int, numbers: Iterable[int]) -> Iterator[TargetExample]:
        """The samples of these numbers, which must ascend; two windows of each stream are kept."""
        return self._merged(TargetStream.samples, seed, numbers)

    def lengths(self, seed: int, numbers: Iterable[int]) -> Iterator[int]:
        """The number of tokens of the samples of these numbers; reads no shard."""
        return self._merged(TargetStream.lengths, seed, numbers)

    def turn(self, number: int) -> tuple[int, int]:
        """The stream that a sample comes from, and its number there."""
        period, place = divmod(number, len(self.turns))
        stream = int(self.turns[place])
        return stream, period * self.shares[stream] + int(self.places[place])

    def _merged(
        self,
        read: Callable[[TargetStream, int, Iterable[int]], Iterator[Any]],
        seed: int,
        numbers: Iterable[int],
    ) -> Iterator[Any]:
        """The values that `read` returns for each stream, in the order of the samples."""
        order, *copies = tee(map(self.turn, numbers), len(self.streams) + 1)
        parts = [
            # each has its own seed: folders of the same data must not be in the same order
            read(stream, seed + (index << 32), _of_stream(index, turns))
            for index, (stream, turns) in enumerate(zip(self.streams, copies, strict=True))
        ]
        return (next(parts[stream]) for stream, _ in order)


def mix(streams: Sequence[TargetStream], weights: Sequence[float] = ()) -> Mixture:
    """Streams in proportion to their weights, whose sum does not matter.

    Without weights, in proportion to their sizes: each example comes once an epoch. Raises
    UserError for weights that are not positive or whose pattern is too long.
    """
    sizes = [len(stream) for stream in streams]
    shares = shares_of(weights) if weights else tuple(size // gcd(*sizes) for size in sizes)
    turns = turns_of(shares)
    places = np.empty_like(turns)
    for stream, share in enumerate(shares):
        places[turns == stream] = np.arange(share)
    return Mixture(tuple(streams), shares, turns, places)


def turns_of(shares: Sequence[int]) -> Ints:
    """The stream of each sample of a period, by the quota method; evenly spread in a long period.

    Among the streams that this sample would not put above their exact share rounded up, it is the
    one with the greatest share / (samples given + 1).
    """
    period = sum(shares)
    if period > LONGEST_PERIOD:  # the quota method takes a second and a half for a million
        places = [(np.arange(share) + 0.5) / share for share in shares]
        streams = np.repeat(np.arange(len(shares), dtype=np.int32), shares)
        return streams[np.argsort(np.concatenate(places), kind="stable")]
    given = [0] * len(shares)
    turns = np.empty(period, np.int32)
    for number in range(period):
        due = [i for i, share in enumerate(shares) if given[i] * period < share * (number + 1)]
        turn = max(due, key=lambda i: shares[i] / (given[i] + 1))
        given[turn] += 1
        turns[number] = turn
    return turns


def _of_stream(index: int, turns: Iterable[tuple[int, int]]) -> Iterator[int]:
    return (number for stream, number in turns if stream == index)
