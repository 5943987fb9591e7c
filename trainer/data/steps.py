"""Cuts samples into optimizer steps, and the samples of a step into micro-batches of each process.

The samples of all epochs form one sequence. A step is a range of it, whatever the number of
processes, so a step's samples and its gradient are the same on any number of them; only the last
step may be smaller. A step's samples are dealt to the ranks, and each rank's share is cut into
micro-batches. Everything is computed from the lengths of the samples, so every rank has the plan of
all ranks without communication.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import NamedTuple, TypeVar

from ...pipeline.format.records import TargetExample
from .batch import Batch, Collator
from .mixture import Mixture
from .stream import TargetStream

Samples = TargetStream | Mixture

_Item = TypeVar("_Item")


class RunSize(NamedTuple):
    """The optimizer steps of a run and the samples they take, repetitions included."""

    steps: int
    samples: int


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


@dataclass(frozen=True, slots=True, eq=False)
class StepLoader:
    """The optimizer steps of a run, each with the micro-batches of one process."""

    samples: Samples
    seed: int
    batch_size: int  # samples of a step, over all processes
    step_tokens: int | None  # tokens of a step; replaces batch_size
    forward_tokens: int  # tokens of a micro-batch
    collate: Collator
    rank: int = 0
    world_size: int = 1

    def size(self, epochs: float, max_steps: int | None = None) -> RunSize:
        """The size of a run of so many epochs, or of `max_steps` steps if that is fewer."""
        samples = max(1, round(epochs * len(self.samples)))
        if self.step_tokens is None:  # then no length is needed
            steps = -(-samples // self.batch_size)
            steps = min(steps, max_steps or steps)
            return RunSize(steps, min(samples, steps * self.batch_size))
        steps = taken = 0
        for step in islice(self.steps_between(0, samples), max_steps):
            steps, taken = steps + 1, step.stop
        return RunSize(steps, taken)

    def steps_between(self, start: int, stop: int) -> Iterator[Step]:
        """The samples from number `start` to `stop` as steps; reads no shard."""
        lengths = self.samples.lengths(self.seed, range(start, stop))
        if self.step_tokens is not None:
            return steps_of_tokens(lengths, start, self.step_tokens)
        return steps_of_samples(lengths, start, self.batch_size)

    def load(self, steps: Iterable[Step]) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps with the micro-batches of this process, of which there is at least one."""
        steps, ahead = tee(steps)
        own = self.rank, self.world_size, self.forward_tokens, self.collate.packed
        plans = (micro_batches(step, *own) for step in ahead)
        for step, chunks in zip(steps, read_steps(self.samples, self.seed, plans), strict=True):
            yield step, [self.collate(chunk) for chunk in chunks]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The held-out examples of all folders, as the batches of one process."""

    streams: Sequence[TargetStream]
    tokens: int  # of a batch, padding included
    collate: Collator
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """The number of examples over all processes."""
        return sum(map(len, self.streams))

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process, in the order of the folders."""
        own = (stream.in_order(self.rank, self.world_size) for stream in self.streams)
        examples = ((each, len(each.input_ids)) for each in chain.from_iterable(own))
        return map(self.collate, cut(examples, self.tokens, packed=False))


def steps_of_samples(lengths: Iterable[int], start: int, samples: int) -> Iterator[Step]:
    """Steps of `samples` samples, the last possibly of fewer; `lengths` begin at number `start`."""
    rest = iter(lengths)
    while step := tuple(islice(rest, samples)):
        yield Step(start, step)
        start += len(step)


def steps_of_tokens(lengths: Iterable[int], start: int, tokens: int) -> Iterator[Step]:
    """Steps of at most `tokens` tokens in total, but of at least one sample."""
    for step in cut(((length, length) for length in lengths), tokens, packed=True):
        yield Step(start, tuple(step))
        start += len(step)


def cut(items: Iterable[tuple[_Item, int]], tokens: int, packed: bool) -> Iterator[list[_Item]]:
    """Consecutive items of at most `tokens` tokens together, but at least one item.

    The items are given with their lengths. Their tokens are the sum of the lengths if packed, their
    number times the longest if padded.
    """
    chunk: list[_Item] = []
    total = longest = 0
    for item, length in items:
        total += length
        if length > longest:
            longest = length
        if chunk and (total if packed else longest * (len(chunk) + 1)) > tokens:
            yield chunk
            chunk, total, longest = [], length, length
        chunk.append(item)
    if chunk:
        yield chunk


def micro_batches(
    step: Step, rank: int, world_size: int, batch_tokens: int, packed: bool
) -> list[list[int]]:
    """The numbers of the samples in each of the rank's micro-batches of a step.

    A micro-batch has at most `batch_tokens` tokens, as `cut` counts them, or a single sample. Every
    rank has the same number of micro-batches, the last ones possibly empty: collective operations
    of forward and backward passes must match.
    """
    plans = [micro_batch_cut(step, s, batch_tokens, packed) for s in deal(step, world_size)]
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
    step: Step, share: Iterable[int], batch_tokens: int, packed: bool
) -> list[list[int]]:
    """Samples of a step, given longest first, cut into micro-batches."""
    lengths, start = step.lengths, step.start
    return list(cut([(n, lengths[n - start]) for n in share], batch_tokens, packed))


def read_steps(
    source: Samples, seed: int, plans: Iterable[list[list[int]]]
) -> Iterator[list[list[TargetExample]]]:
    """The examples of each step's micro-batches.

    A rank's share of a step is in memory at once. Plans are consumed up to two windows ahead,
    or four of a remote folder.
    """
    plans, ahead = tee(plans)
    examples = source.samples(seed, chain.from_iterable(sorted(chain(*plan)) for plan in ahead))
    for plan in plans:
        numbers = sorted(chain(*plan))
        of_number = dict(zip(numbers, islice(examples, len(numbers)), strict=True))
        yield [[of_number[number] for number in batch] for batch in plan]
