"""Converts flat batches to Arrow record batches and back, and checks what it decodes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError, quoted
from .batches import FlatBatch
from .packing import pack, unpack
from .ragged import segment_sums
from .schema import Schema


def encode(schema: Schema, batch: FlatBatch) -> pa.RecordBatch:
    """Encode a batch, with ids narrowed to their stored type."""
    columns: list[pa.Array] = [pa.array(batch.ids, pa.string())]
    arrays = batch.arrays if schema.packing is None else pack(batch.arrays, schema.packing)
    for column in schema.as_stored.lists:
        offsets = np.concatenate([[0], np.cumsum(batch.lengths[column.level])]).astype(np.int32)
        values = arrays[column.name]
        stored = values.astype(column.stored, copy=False)
        fits = stored.dtype == values.dtype or np.array_equal(stored, values)
        assert fits, f"{column.name} holds values outside the range of its type"
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(stored)))
    return pa.RecordBatch.from_arrays(columns, schema=schema.arrow)


def decode(schema: Schema, batch: pa.RecordBatch, where: str) -> FlatBatch:
    """Decode an Arrow batch.

    Raises UserError for null values, lists of different lengths, counts that do not add up, and
    positions or ids out of range. The message begins with `where` and names the row and the column.
    """
    if batch.schema != schema.arrow:
        raise UserError(f"{where}: its columns are not those of this format")
    ids = batch.column("id")
    arrays: dict[str, NDArray[Any]] = {}
    lengths: dict[str, NDArray[np.int64]] = {}
    rows = _Rows(where, ids, lengths)
    rows.refuse("row", _nulls(ids), "id has null values")
    for column in schema.as_stored.lists:
        values = batch.column(column.name)
        rows.refuse("row", _nulls(values), f"{column.name} has null values")
        length = np.diff(values.offsets.to_numpy()).astype(np.int64)
        others = lengths.setdefault(column.level, length)
        rows.refuse("row", length != others, f"{column.name} differs in length from other columns")
        flat = values.flatten()
        rows.refuse(column.level, _nulls(flat), f"{column.name} has null values")
        array = arrays[column.name] = flat.to_numpy().astype(column.dtype, copy=False)
        if column.name.endswith("_ids"):
            outside = (array < 0) | (array >= schema.vocab_size)
            rows.refuse(column.level, outside, f"{column.name} is outside the vocabulary")
    _check_references(arrays, rows)
    if schema.packing is not None:
        arrays = unpack(arrays, schema.packing, rows.error)
    return FlatBatch(ids.to_pylist(), arrays, lengths)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of a batch that is being decoded, for error messages."""

    where: str
    ids: pa.Array
    lengths: dict[str, NDArray[np.int64]]

    def error(self, level: str, place: int, what: str) -> UserError:
        """The error for the value at `place` of a level; the level "row" counts rows."""
        row = row_of(self.lengths, level, place)
        name = quoted(str(self.ids[row].as_py()))
        return UserError(f"{self.where}, row {row} ({name}): column {what}")

    def refuse(self, level: str, is_wrong: NDArray[np.bool_], what: str) -> None:
        """Raise the error for the first place that is wrong, if any."""
        if is_wrong.any():
            raise self.error(level, int(np.argmax(is_wrong)), what)


def _check_references(arrays: dict[str, NDArray[Any]], rows: _Rows) -> None:
    """Refuse counts and positions that are out of range."""
    counts, positions, lengths = arrays["counts"], arrays["positions"], rows.lengths
    rows.refuse("position", counts < 0, "counts is negative")
    # in 64 bits: a sum of huge counts could overflow to a small number
    entries = segment_sums(counts.astype(np.int64), lengths["position"])
    is_off = entries != lengths["entry"]
    rows.refuse("row", is_off, "counts does not add up to the entries of its row")
    tokens_N = np.repeat(lengths["token"], lengths["position"])
    astray = (positions < 1) | (positions >= tokens_N)
    rows.refuse("position", astray, "positions is outside the tokens of its row")


def row_of(lengths: dict[str, NDArray[np.int64]], level: str, place: int) -> int:
    """The row of the value at `place` of a level; the level "row" counts rows."""
    if level == "row":
        return place
    return int(np.searchsorted(np.cumsum(lengths[level]), place, side="right"))


def _nulls(values: pa.Array) -> NDArray[np.bool_]:
    if values.null_count == 0:
        return np.zeros(0, bool)
    return values.is_null().to_numpy(zero_copy_only=False)
