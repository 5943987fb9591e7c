"""Streams a sealed target folder, one shard in memory at a time.

The order of the samples is a function of the data, the seed and the epoch alone: shards are
permuted, then the rows within each. Ranks take every `world_size`-th sample of that one order, so
any number of them sees the same samples, step by step.

Opening a folder reads it once, to check every shard's hash and to learn which rows are held out;
what stays in memory is eight bytes a row.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..pipeline.codec import split
from ..pipeline.manifest import Manifest, ShardEntry
from ..pipeline.records import TargetExample
from ..pipeline.shards import folder_schema, read_shard

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TargetStream:
    """Some of the examples of a target folder: those at `rows[shard]` of each shard."""

    folder: Path
    manifest: Manifest
    rows: tuple[Rows, ...]
    positions: int  # supervised positions of these examples

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def shuffled(self, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[TargetExample]:
        """The rank's share of an endless run of epochs, each in an order of its own."""
        for epoch in count():
            order = shuffle(self.rows, seed, epoch)
            yield from self._read(order, epoch * len(self), rank, world_size)

    def in_order(self, rank: int = 0, world_size: int = 1) -> Iterator[TargetExample]:
        """The rank's share of the examples, as they stand in the folder."""
        return self._read(enumerate(self.rows), 0, rank, world_size)

    def _read(
        self, order: Iterable[tuple[int, Rows]], start: int, rank: int, world_size: int
    ) -> Iterator[TargetExample]:
        """Each sample whose number, counted from `start`, is `rank` modulo `world_size`."""
        for shard, rows in order:
            mine = rows[(rank - start) % world_size :: world_size]
            start += len(rows)
            if len(mine):
                yield from self._read_rows(shard, mine)

    def _read_rows(self, shard: int, rows: Rows) -> Iterator[TargetExample]:
        schema = folder_schema(self.manifest)
        # opening the folder has compared the hash already
        batches = read_shard(self.folder, self.manifest, self.manifest.shards[shard], verify=False)
        examples = [example for batch in batches for example in split(schema, batch)]
        for row in rows:
            yield examples[row]


def open_streams(
    folder: Path, manifest: Manifest, eval_fraction: float
) -> tuple[TargetStream, TargetStream]:
    """The examples to train on and those held out; examples without supervision are in neither.

    Raises UserError where a shard is missing or damaged.
    """
    train_rows: list[Rows] = []
    eval_rows: list[Rows] = []
    train_positions = eval_positions = 0
    for entry in manifest.shards:
        ids, positions = _outline(folder, manifest, entry)
        held_out = np.array([is_held_out(row_id, eval_fraction) for row_id in ids], bool)
        train_rows.append(np.flatnonzero(~held_out & (positions > 0)))
        eval_rows.append(np.flatnonzero(held_out & (positions > 0)))
        train_positions += int(positions[~held_out].sum())
        eval_positions += int(positions[held_out].sum())
    return (
        TargetStream(folder, manifest, tuple(train_rows), train_positions),
        TargetStream(folder, manifest, tuple(eval_rows), eval_positions),
    )


def is_held_out(example_id: str, eval_fraction: float) -> bool:
    """Whether an example is for evaluation: decided by its id alone, whatever stands around it."""
    digest = hashlib.sha256(example_id.encode()).digest()
    return int.from_bytes(digest[:8]) < eval_fraction * 2**64


def shuffle(rows: tuple[Rows, ...], seed: int, epoch: int) -> Iterator[tuple[int, Rows]]:
    """The shards in the order of an epoch, each with its rows in theirs."""
    generator = np.random.default_rng((seed, epoch))
    for shard in generator.permutation(len(rows)):
        yield int(shard), generator.permutation(rows[shard])


def _outline(folder: Path, manifest: Manifest, entry: ShardEntry) -> tuple[list[str], Rows]:
    """The ids of a shard's rows and how many supervised positions each has."""
    batches = list(read_shard(folder, manifest, entry))
    ids = [row_id for batch in batches for row_id in batch.ids]
    lengths = [batch.lengths["position"] for batch in batches]
    return ids, np.concatenate([np.empty(0, np.int64), *lengths])
