"""Streams the examples of a sealed target folder in random order.

The samples of all epochs form one endless sequence, numbered from 0: with n samples an epoch,
sample s belongs to epoch s // n. Sample s depends on the seed, its epoch and the folder alone, so
the state of a stream is one number, and any process may read any sample.

The order of an epoch: the blocks (record batches of all shards) are permuted and cut into windows
of `WINDOW_BLOCKS`, then the rows of each window are permuted. One window is in memory at a time,
and reading starts at the window of the first sample that is asked for.

Opening a folder reads it once, to verify the hash of every shard, choose the held-out rows and
count the tokens of each row; twelve bytes a row stay in memory.

B blocks, R rows of a stream, W windows of an epoch.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import split
from ...pipeline.format.records import Ints, TargetExample

WINDOW_BLOCKS = 16  # about a thousand rows to shuffle among

Rows = NDArray[np.int64]  # indices into the rows of a stream


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """The rows of a stream, block by block; every block has at least one.

    Those of block b are `starts[b]` up to `starts[b + 1]`, in the order of the folder.
    """

    shards: Ints  # [B] the block's shard
    numbers: Ints  # [B] the block's record batch, within the shard
    starts: Rows  # [B + 1]
    places: Ints  # [R] the row's place in its record batch
    tokens: Ints  # [R]


@dataclass(frozen=True, slots=True, eq=False)
class Epoch:
    """The order of the samples of one epoch."""

    outline: Outline
    seed: int
    index: int
    blocks: Rows  # [B] permuted
    window_starts: list[int]  # [W + 1], in samples since the start of the epoch

    def rows(self, window: int) -> Rows:
        """The rows of a window in the order of its samples."""
        first = window * WINDOW_BLOCKS
        starts = self.outline.starts
        blocks = self.blocks[first : first + WINDOW_BLOCKS]
        rows = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in blocks])
        return rows[permutation(len(rows), self.seed, self.index, window)]


@dataclass(frozen=True, slots=True, eq=False)
class TargetStream:
    """Some of the examples of a target folder."""

    folder: SealedFolder
    outline: Outline

    def __len__(self) -> int:
        """Samples an epoch."""
        return len(self.outline.places)

    def samples(self, seed: int, numbers: Iterable[int]) -> Iterator[TargetExample]:
        """The samples of these numbers, which must ascend, so that no window is read twice.

        Up to a window of the numbers is consumed ahead. Raises UserError where a shard is missing
        or damaged.
        """
        for rows in self._windows(seed, numbers):
            yield from self.at(rows)

    def lengths(self, seed: int, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers of tokens of the samples of these numbers; reads no shard."""
        for rows in self._windows(seed, numbers):
            yield from self.outline.tokens[rows].tolist()

    def in_order(self, rank: int = 0, world_size: int = 1) -> Iterator[TargetExample]:
        """The rank's share of the examples, in the order of the folder."""
        return self._read_ascending(np.arange(rank, len(self), world_size))

    def at(self, rows: Rows) -> Iterator[TargetExample]:
        """The examples at these rows, in their order; all are in memory at once."""
        by_row = np.argsort(rows)
        examples = list(self._read_ascending(rows[by_row]))
        return (examples[index] for index in np.argsort(by_row))

    def _windows(self, seed: int, numbers: Iterable[int]) -> Iterator[Rows]:
        """The rows of the samples, a window at a time."""
        for (epoch, window), group in groupby(self._located(seed, numbers), itemgetter(0, 1)):
            yield epoch.rows(window)[[place for *_, place in group]]

    def _located(self, seed: int, numbers: Iterable[int]) -> Iterator[tuple[Epoch, int, int]]:
        """Each sample's epoch, the window within the epoch and the place within the window."""
        epoch = None
        for number in numbers:
            index, place = divmod(number, len(self))
            if epoch is None or epoch.index != index:
                epoch = epoch_of(self.outline, seed, index)
            window = bisect_right(epoch.window_starts, place) - 1
            yield epoch, window, place - epoch.window_starts[window]

    def _read_ascending(self, rows: Rows) -> Iterator[TargetExample]:
        """The examples at ascending rows, a block at a time, each shard opened once."""
        outline, schema = self.outline, self.folder.schema
        block_of_row = np.searchsorted(outline.starts, rows, side="right") - 1
        blocks, firsts = np.unique(block_of_row, return_index=True)
        # not strict: no rows at all still split into one part
        parts = zip(blocks, np.split(outline.places[rows], firsts[1:]), strict=False)
        for shard, of_shard in groupby(parts, lambda part: int(outline.shards[part[0]])):
            wanted = ((int(outline.numbers[block]), places) for block, places in of_shard)
            for batch in self.folder.rows(shard, wanted):
                yield from split(schema, batch)


def open_streams(
    folder: SealedFolder, eval_fraction: float, *, verify: bool = True
) -> tuple[TargetStream, TargetStream]:
    """The examples to train on and those held out; examples without supervision are in neither.

    `verify` compares the hash of every shard. Raises UserError where a shard is missing or damaged.
    """
    train_blocks: list[Block] = []
    eval_blocks: list[Block] = []
    for shard in folder.shards:
        for number, batch in enumerate(folder.batches(shard, verify=verify)):
            held_out = np.array([is_held_out(row_id, eval_fraction) for row_id in batch.ids], bool)
            has_positions = batch.lengths["position"] > 0
            for blocks, mask in ((train_blocks, ~held_out), (eval_blocks, held_out)):
                places = np.flatnonzero(mask & has_positions).astype(np.int32)
                if len(places):
                    tokens = batch.lengths["token"][places].astype(np.int32)
                    blocks.append((shard, number, places, tokens))
    return (
        TargetStream(folder, outline_of(train_blocks)),
        TargetStream(folder, outline_of(eval_blocks)),
    )


def is_held_out(example_id: str, eval_fraction: float) -> bool:
    """Whether an example is held out for evaluation; depends on its id alone."""
    digest = hashlib.sha256(example_id.encode()).digest()
    return int.from_bytes(digest[:8]) < eval_fraction * 2**64


def epoch_of(outline: Outline, seed: int, index: int) -> Epoch:
    """The order of epoch `index`."""
    blocks_B = permutation(len(outline.shards), seed, index)
    ends_B = np.cumsum(np.diff(outline.starts)[blocks_B])
    window_ends = np.unique([*ends_B[WINDOW_BLOCKS - 1 :: WINDOW_BLOCKS], *ends_B[-1:]])
    return Epoch(outline, seed, index, blocks_B, [0, *window_ends.tolist()])


def permutation(size: int, seed: int, *key: int) -> Rows:
    """The numbers below `size` in random order, which depends on the seed and the key.

    They are sorted by raw random bits: numpy guarantees that these stay the same from version to
    version, which it does not for its own permutations.
    """
    source = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key))
    return np.argsort(source.random_raw(size), kind="stable")


Block = tuple[int, int, Ints, Ints]  # shard, record batch; its rows' places and tokens


def outline_of(blocks: Sequence[Block]) -> Outline:
    """The outline of the rows in these blocks, in order."""
    none = np.empty(0, np.int32)
    shards, numbers, places, tokens = zip(*blocks, strict=True) if blocks else [()] * 4
    return Outline(
        shards=np.array(shards, np.int32),
        numbers=np.array(numbers, np.int32),
        starts=np.cumsum([0, *map(len, places)]),
        places=np.concatenate([none, *places]),
        tokens=np.concatenate([none, *tokens]),
    )
