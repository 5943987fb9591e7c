"""Flat batches: several examples as one set of arrays, processed without loops over tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import Example
from .schema import Schema


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """Several examples: the lists of all rows joined end to end, and their lengths.

    `lengths[level][r]` is the number of values of row r at that level.
    """

    ids: list[str]
    arrays: dict[str, NDArray[Any]]
    lengths: dict[str, NDArray[np.int64]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    @property
    def observed_ids(self) -> NDArray[np.int32]:
        """The supervised token at every position of the batch, [N]."""
        row_starts = np.cumsum(self.lengths["token"]) - self.lengths["token"]
        first_token = np.repeat(row_starts, self.lengths["position"])
        return self.arrays["input_ids"][first_token + self.arrays["positions"]]


def flatten(schema: Schema, examples: Sequence[Example]) -> FlatBatch:
    """Join records end to end."""
    arrays = {}
    lengths: dict[str, NDArray[np.int64]] = {}
    for column in schema.lists:
        parts = [getattr(example, column.name) for example in examples]
        arrays[column.name] = np.concatenate([np.empty(0, column.dtype), *parts])
        length = np.array([len(part) for part in parts], np.int64)
        same = np.array_equal(lengths.setdefault(column.level, length), length)
        assert same, f"{column.name} differs in length from the other {column.level} columns"
    return FlatBatch([example.id for example in examples], arrays, lengths)


def split(schema: Schema, batch: FlatBatch) -> Iterator[Any]:
    """The records of a batch, as views of its arrays."""
    ends = {level: np.cumsum(lengths) for level, lengths in batch.lengths.items()}
    for row, example_id in enumerate(batch.ids):
        of_row = {
            level: slice(int(ends[level][row] - batch.lengths[level][row]), int(ends[level][row]))
            for level in ends
        }
        lists = {column.name: batch[column.name][of_row[column.level]] for column in schema.lists}
        yield schema.record(id=example_id, **lists)


def cut(schema: Schema, batch: FlatBatch, most_positions: int) -> Iterator[FlatBatch]:
    """Cut a batch into pieces of whole rows: at most `most_positions` each, but at least a row."""
    ends = np.cumsum(batch.lengths["position"])
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + most_positions, side="right"))
        rows = slice(start, max(stop, start + 1))
        yield _rows_between(schema, batch, rows)
        start = rows.stop


def join(batches: Sequence[FlatBatch]) -> FlatBatch:
    """Join one batch or more end to end."""
    first = batches[0]
    return FlatBatch(
        [row_id for batch in batches for row_id in batch.ids],
        {name: np.concatenate([batch[name] for batch in batches]) for name in first.arrays},
        {
            level: np.concatenate([batch.lengths[level] for batch in batches])
            for level in first.lengths
        },
    )


def _rows_between(schema: Schema, batch: FlatBatch, rows: slice) -> FlatBatch:
    arrays = {}
    for column in schema.lists:
        ends = np.concatenate([[0], np.cumsum(batch.lengths[column.level])])
        arrays[column.name] = batch[column.name][ends[rows.start] : ends[rows.stop]]
    lengths = {level: each[rows] for level, each in batch.lengths.items()}
    return FlatBatch(batch.ids[rows], arrays, lengths)
