"""Cuts samples into optimizer steps, and the samples of a step into micro-batches of each process.

A step is a range of the sequence of samples, whatever the number of processes. Its samples are
dealt to the ranks, and each rank's share is cut into micro-batches. Everything is computed from the
lengths of the samples, so every rank has the plan of all ranks without communication.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import Protocol

from ...pipeline.format.records import TargetExample


class Samples(Protocol):
    """A sequence of samples: a `TargetStream` or a `Mixture`."""

    def __len__(self) -> int:
        """Samples an epoch."""
        ...

    def samples(self, seed: int, numbers: Iterable[int]) -> Iterator[TargetExample]:
        """The samples of ascending numbers."""
        ...

    def lengths(self, seed: int, numbers: Iterable[int]) -> Iterator[int]:
        """The number of tokens of each sample."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """Consecutive samples from number `start`; `lengths` are their numbers of tokens."""

    start: int
    lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The number of the sample after the last, at which the next step starts."""
        return self.start + len(self.lengths)


@dataclass(frozen=True, slots=True)
class Cadence:
    """Due after every `every` steps of a run, but not after the last."""

    every: int | None  # None is never
    last: int

    def is_due(self, step: int) -> bool:
        """Whether it is due after this step."""
        return self.every is not None and step % self.every == 0 and step < self.last


def steps_of_samples(lengths: Iterable[int], start: int, samples: int) -> Iterator[Step]:
    """Steps of `samples` samples, the last possibly of fewer; `lengths` begin at number `start`."""
    rest = iter(lengths)
    while step := tuple(islice(rest, samples)):
        yield Step(start, step)
        start += len(step)


def steps_of_tokens(lengths: Iterable[int], start: int, tokens: int) -> Iterator[Step]:
    """Steps of at most `tokens` tokens in total, but of at least one sample."""
    step: list[int] = []
    total = 0
    for length in lengths:
        if step and total + length > tokens:
            yield Step(start, tuple(step))
            start += len(step)
            step, total = [], 0
        step.append(length)
        total += length
    if step:
        yield Step(start, tuple(step))


def micro_batches(
    step: Step, rank: int, world_size: int, batch_tokens: int, packed: bool
) -> list[list[int]]:
    """The numbers of the samples in each of the rank's micro-batches of a step.

    A micro-batch has at most `batch_tokens` tokens, or a single sample: rows times the longest if
    padded, the sum of the samples' tokens if packed. Every rank has the same number of
    micro-batches, the last ones possibly empty: collective operations of forward and backward
    passes must match.
    """
    shares = deal(step, world_size)
    plans = [micro_batch_cut(step, share, batch_tokens, packed) for share in shares]
    missing = max(map(len, plans)) - len(plans[rank])
    return plans[rank] + [[] for _ in range(missing)]


def deal(step: Step, world_size: int) -> list[list[int]]:
    """The numbers of each rank's samples: longest first, to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]  # a heap: of equal loads, the lowest rank
    for place in sorted(range(len(step.lengths)), key=lambda place: -step.lengths[place]):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + step.lengths[place], rank))
        shares[rank].append(step.start + place)
    return shares


def micro_batch_cut(
    step: Step, share: Sequence[int], batch_tokens: int, packed: bool
) -> list[list[int]]:
    """Samples of a step, given longest first, cut into micro-batches."""
    batches: list[list[int]] = []
    used = longest = 0
    for number in share:
        length = step.lengths[number - step.start]
        cost = length if packed else longest
        if not batches or used + cost > batch_tokens:
            batches.append([])
            used, longest, cost = 0, length, length
        batches[-1].append(number)
        used += cost
    return batches


def read_steps(
    source: Samples, seed: int, plans: Iterable[list[list[int]]]
) -> Iterator[list[list[TargetExample]]]:
    """The examples of each step's micro-batches.

    A rank's share of a step is in memory at once. Plans are consumed up to a window ahead.
    """
    plans, ahead = tee(plans)
    numbers = chain.from_iterable(sorted(chain(*plan)) for plan in ahead)
    examples = source.samples(seed, numbers)
    return (_examples_of(plan, examples) for plan in plans)


def _examples_of(
    plan: list[list[int]], examples: Iterator[TargetExample]
) -> list[list[TargetExample]]:
    numbers = sorted(chain(*plan))
    of_number = dict(zip(numbers, islice(examples, len(numbers)), strict=True))
    return [[of_number[number] for number in batch] for batch in plan]
