"""Streams the examples of a sealed target folder in random order.

The samples of all epochs form one endless sequence, numbered from 0: with n samples an epoch,
sample s belongs to epoch s // n. Sample s depends on the seed, its epoch and the folder alone, so
the state of a stream is one number, and any process may read any sample.

The order of an epoch: the blocks (record batches of all shards) are permuted and cut into windows
of `WINDOW_BLOCKS`, then the rows of each window are permuted. Two windows are in memory: one is
decoded while the one before is used. Reading starts at the window of the first sample that is asked
for.

Opening a folder reads its index: the tokens of each row, and the hashes of the ids, which choose
the held-out rows. Eight bytes a row stay in memory. The hash of a shard is compared when the first
of its rows is read.

B blocks, R rows of a stream, W windows of an epoch.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.row_index import RowOutline
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import split
from ...pipeline.format.records import Ints, TargetExample
from ...pipeline.storage.remote import is_remote
from ...pipeline.threads import in_order, in_progress

WINDOW_BLOCKS = 16  # about a thousand rows to shuffle among
FETCHES = WINDOW_BLOCKS  # of remote shards at a time: each block of a window may need another one

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
    verify: bool = True  # the hash of each shard, before its rows are read

    def __len__(self) -> int:
        """Samples an epoch."""
        return len(self.outline.places)

    def samples(self, seed: int, numbers: Iterable[int]) -> Iterator[TargetExample]:
        """The samples of these numbers, which must ascend, so that no window is read twice.

        Up to two windows of the numbers are consumed ahead, and two more of a remote folder, whose
        shards are then fetched. Raises UserError where a shard is missing or damaged.
        """
        windows = self._windows(seed, numbers)
        if self.verify and is_remote(self.folder.path):
            fetched = in_progress(self._fetched, windows, workers=1)
            decoded = in_order(lambda rows: self.at(rows.result()), fetched, workers=1)
        else:
            decoded = in_order(self.at, windows, workers=1)
        for examples in decoded:
            yield from examples

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

    def _fetched(self, rows: Rows) -> Rows:
        """The same rows, once their shards are fetched and verified."""
        shards = np.unique(self.outline.shards[self._blocks_of(rows)])
        for _ in in_order(self.folder.check_once, shards.tolist(), workers=FETCHES):
            pass
        return rows

    def _blocks_of(self, rows: Rows) -> Rows:
        return np.searchsorted(self.outline.starts, rows, side="right") - 1

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
        blocks, firsts = np.unique(self._blocks_of(rows), return_index=True)
        # not strict: no rows at all still split into one part
        parts = zip(blocks, np.split(rows, firsts[1:]), strict=False)
        for shard, of_shard in groupby(parts, lambda part: int(outline.shards[part[0]])):
            if self.verify:
                self.folder.check_once(shard)
            wanted = list(of_shard)
            places = ((int(outline.numbers[block]), outline.places[own]) for block, own in wanted)
            batches = self.folder.rows(shard, places)
            for batch, (_, own) in zip(batches, wanted, strict=True):
                if not np.array_equal(batch.lengths["token"], outline.tokens[own]):
                    raise UserError(
                        f"{self.folder.shard_path(shard)}: differs from the index of its folder: "
                        f"make {self.folder.path} again"
                    )
                yield from split(schema, batch)


def open_streams(
    folder: SealedFolder, eval_fraction: float, *, verify: bool = True
) -> tuple[TargetStream, TargetStream]:
    """The examples to train on and those held out; examples without supervision are in neither.

    Reads the index of the folder; a folder without an index is read as a whole. `verify` compares
    the hash of every shard before its rows are used. Raises UserError where a shard is missing or
    damaged.
    """
    train_blocks: list[Blocks] = []
    eval_blocks: list[Blocks] = []
    for rows in folder.outlines(verify=verify):
        held_out = are_held_out(rows.id_hashes, eval_fraction)
        for blocks, mask in ((train_blocks, ~held_out), (eval_blocks, held_out)):
            blocks.append(_blocks(rows, mask & (rows.positions > 0)))
    return (
        TargetStream(folder, joined(train_blocks), verify),
        TargetStream(folder, joined(eval_blocks), verify),
    )


def are_held_out(id_hashes: NDArray[np.uint64], eval_fraction: float) -> NDArray[np.bool_]:
    """Whether examples are held out for evaluation; depends on the hashes of their ids alone."""
    return id_hashes < np.uint64(math.ceil(eval_fraction * 2**64))


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


class Blocks(NamedTuple):
    """The blocks of consecutive shards that a stream has rows of."""

    shards: Ints  # [B]
    numbers: Ints  # [B]
    sizes: Ints  # [B]
    places: Ints  # [R]
    tokens: Ints  # [R]


def _blocks(rows: RowOutline, mask: NDArray[np.bool_]) -> Blocks:
    blocks, sizes = np.unique(rows.blocks[mask], return_counts=True)
    columns = blocks >> 32, blocks & 0xFFFFFFFF, sizes, rows.places[mask], rows.tokens[mask]
    return Blocks(*(column.astype(np.int32) for column in columns))


def joined(blocks: Sequence[Blocks]) -> Outline:
    """The outline of the rows in these blocks, in order."""
    none = np.empty(0, np.int32)
    parts = zip(*blocks, strict=True) if blocks else [()] * len(Blocks._fields)
    shards, numbers, sizes, places, tokens = (np.concatenate([none, *part]) for part in parts)
    return Outline(shards, numbers, np.append(0, np.cumsum(sizes, dtype=np.int64)), places, tokens)
