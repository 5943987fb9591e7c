"""Readers of Parquet and Arrow files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ....pipeline.storage.files import sha256_of_file
from .reader import Lines, Reader, without_nones

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 256  # turned into Python objects at a time
BUFFER_BYTES = 1 << 20


def parquet_reader(path: Path) -> Reader:
    """Read a Parquet file, some rows of a row group at a time."""
    from pyarrow.parquet import read_metadata

    return Reader(
        lambda start: _parquet_rows(path, start),
        lambda: (sha256_of_file(path), read_metadata(path).num_rows),
        finds_rows=True,
    )


def _parquet_rows(path: Path, start: int) -> Lines:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row + size > start:
                batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
                yield from _batch_rows(batches, row, start)
            row += size


def arrow_reader(path: Path) -> Reader:
    """Read an Arrow file of either IPC format, mapped into memory."""
    return Reader(
        lambda start: _batch_rows(_arrow_batches(path), 0, start),
        lambda: (sha256_of_file(path), sum(batch.num_rows for batch in _arrow_batches(path))),
        finds_rows=True,
    )


def _arrow_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    """The record batches of an Arrow file of either IPC format, mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _batch_rows(batches: "Iterator[pa.RecordBatch]", row: int, start: int) -> Lines:
    """Yield rows from `start` on of batches whose first row is number `row`."""
    for batch in batches:
        batch.validate(full=True)  # invalid list offsets would crash the process
        for offset in range(max(0, start - row), batch.num_rows, BATCH_ROWS):
            rows = batch.slice(offset, BATCH_ROWS).to_pylist()
            yield from enumerate(map(without_nones, rows), row + offset + 1)
        row += batch.num_rows
