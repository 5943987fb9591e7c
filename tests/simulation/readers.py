"""An epoch read by a thousand ranks that die and come back in another number.

Real target folders, the real stream, plan and mixture; a step is what all ranks have read of it,
and there is no model. Every few steps there is a checkpoint: the number of samples consumed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from qpipe.pipeline.folders import sealed
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import TargetExample
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of
from qpipe.trainer.data.steps import Samples, Step, micro_batches, read_steps, steps_of_samples
from qpipe.trainer.data.stream import TargetStream, open_streams

FORWARD_TOKENS = 64
CHECKPOINT_EVERY = 2  # steps


@dataclass(frozen=True)
class Attempt:
    """So many ranks, which take so many steps until one of them dies; None: none does."""

    ranks: int
    steps: int | None = None


@dataclass
class Read:
    """What was read, and for how many samples."""

    batches: int = 0
    rows: int = 0  # of these record batches
    samples: int = 0

    @property
    def amplification(self) -> float:
        """Rows read for each that was wanted."""
        return self.rows / self.samples


def make_folder(folder: Path, rows: int, per_shard: int = 64) -> TargetStream:
    """A stream over a folder of rows of 3 to 12 tokens, in shards of one record batch."""
    rng = np.random.default_rng(0)
    examples = []
    for row in range(rows):
        ids = rng.integers(1, 300, int(rng.integers(3, 13))).tolist()
        examples.append(targeted(f"{folder.name}-{row}", ids, [0.5], [{ids[-1]: 0.9}]))
    folder_of(folder, examples, shards=rows // per_shard)
    return open_streams(open_sealed(folder), 0.0)[0]


def read_epoch(
    samples: Samples, attempts: Sequence[Attempt], step_samples: int, seed: int = 0
) -> tuple[list[list[str]], int, Read]:
    """The ids of each step that counts, how many samples were read in vain, and what was read.

    A step is given as the ids of its samples by their numbers, whichever rank read them.
    """
    steps: list[list[str]] = []
    read_in_vain = 0
    with counted() as read:
        for attempt in attempts:
            start = len(steps) * step_samples
            for number, ids in enumerate(_steps(samples, attempt.ranks, start, step_samples, seed)):
                read.samples += len(ids)
                if number == attempt.steps:
                    read_in_vain += len(ids)
                    break
                steps.append(ids)
            kept = len(steps) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
            if attempt.steps is not None:
                read_in_vain += sum(map(len, steps[kept:]))
                del steps[kept:]
    return steps, read_in_vain, read


def _steps(
    samples: Samples, ranks: int, start: int, step_samples: int, seed: int
) -> Iterator[list[str]]:
    """The ids of each step's samples, read by all of the ranks."""
    lengths = samples.lengths(seed, range(start, len(samples)))
    own, *copies = tee(steps_of_samples(lengths, start, step_samples), ranks + 1)
    planned = [tee(_plans(steps, rank, ranks)) for rank, steps in enumerate(copies)]
    readers = [read_steps(samples, seed, plans) for plans, _ in planned]
    for step in own:
        found: dict[int, str] = {}
        for reader, (_, plans) in zip(readers, planned, strict=True):
            for numbers, examples in zip(next(plans), next(reader), strict=True):
                _note(found, numbers, examples)
        yield [found.pop(number) for number in range(step.start, step.stop)]
        assert not found


def _plans(steps: Iterator[Step], rank: int, ranks: int) -> Iterator[list[list[int]]]:
    return (micro_batches(step, rank, ranks, FORWARD_TOKENS, False) for step in steps)


def _note(found: dict[int, str], numbers: list[int], examples: list[TargetExample]) -> None:
    for number, example in zip(numbers, examples, strict=True):
        assert number not in found, f"sample {number} was read twice in a step"
        found[number] = example.id


def read_by_one(stream: TargetStream, ranks: int, of_each: int) -> Read:
    """What one of so many ranks reads in an epoch of steps of `of_each` samples a rank."""
    lengths = stream.lengths(0, range(len(stream)))
    steps = steps_of_samples(lengths, 0, of_each * ranks)
    with counted() as read:
        for batches in read_steps(stream, 0, _plans(steps, 0, ranks)):
            read.samples += sum(map(len, batches))
    return read


@contextmanager
def counted() -> Iterator[Read]:
    """Count the record batches that are read within the block."""
    read = Read()
    get = sealed.read_batch

    def counting(reader: Any, number: int) -> Any:
        batch = get(reader, number)
        read.batches += 1
        read.rows += batch.num_rows
        return batch

    with patch.object(sealed, "read_batch", counting):
        yield read
