"""The batches of a run: those of its optimizer steps, and those of its evaluations.

The samples of all epochs form one sequence, cut into optimizer steps; only the last may be smaller.
A step's samples, and so its gradient, are the same on any number of processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, tee
from typing import NamedTuple

from ...pipeline.format.records import TargetExample
from .batch import Batch, Collator
from .steps import Samples, Step, micro_batches, read_steps, steps_of_samples, steps_of_tokens
from .stream import TargetStream


class RunSize(NamedTuple):
    """The optimizer steps of a run and the samples they take, repetitions included."""

    steps: int
    samples: int


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
        """The size of a run of so many epochs, or fewer if that takes more than `max_steps`."""
        samples = max(1, round(epochs * len(self.samples)))
        if self.step_tokens is None:  # then no length is needed
            steps = -(-samples // self.batch_size)
            steps = min(steps, max_steps or steps)
            return RunSize(steps, min(samples, steps * self.batch_size))
        steps = taken = 0
        for step in self.steps_between(0, samples):
            if steps == max_steps:
                break
            steps, taken = steps + 1, step.stop
        return RunSize(steps, taken)

    def steps_between(self, start: int, stop: int) -> Iterator[Step]:
        """The samples from number `start` to `stop` as steps; reads nothing."""
        lengths = self.samples.lengths(self.seed, range(start, stop))
        if self.step_tokens is not None:
            return steps_of_tokens(lengths, start, self.step_tokens)
        return steps_of_samples(lengths, start, self.batch_size)

    def load(self, steps: Iterable[Step]) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps with the micro-batches of this process, of which at least one."""
        steps, ahead = tee(steps)
        examples = read_steps(self.samples, self.seed, map(self._micro_batches, ahead))
        for step, chunks in zip(steps, examples, strict=True):
            yield step, [self.collate(chunk) for chunk in chunks]

    def _micro_batches(self, step: Step) -> list[list[int]]:
        return micro_batches(
            step, self.rank, self.world_size, self.forward_tokens, self.collate.packed
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The held-out examples of all folders, as the batches of one process."""

    streams: Sequence[TargetStream]
    tokens: int  # of a batch, padding included
    collate: Collator
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Examples over all processes."""
        return sum(map(len, self.streams))

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process, in the order of the folders."""
        own = (stream.in_order(self.rank, self.world_size) for stream in self.streams)
        return map(self.collate, by_tokens(chain.from_iterable(own), self.tokens))


def by_tokens(examples: Iterable[TargetExample], tokens: int) -> Iterator[list[TargetExample]]:
    """Consecutive examples of at most `tokens` padded tokens, but at least one."""
    chunk: list[TargetExample] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.input_ids))
        if chunk and longest * (len(chunk) + 1) > tokens:
            yield chunk
            chunk, longest = [], len(example.input_ids)
        chunk.append(example)
    if chunk:
        yield chunk
