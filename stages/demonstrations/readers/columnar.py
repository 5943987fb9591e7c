"""Readers of Parquet and Arrow files.

Both are compressed in pieces, pages and record batches, that are decompressed as a whole: pieces
that state a large size are refused before that. Texts of Parquet are read as dictionaries, so that
a text that many rows repeat is held once, and a row is decoded only if it is not too long.
"""

from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....pipeline.storage.files import sha256_of_file
from .reader import LONGEST_LINE, TOO_LONG, Lines, Reader, without_nones

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, RowGroupMetaData

BATCH_ROWS = 256  # turned into Python objects at a time
MOST_MEMORY = 1 << 30  # bytes that Arrow may hold of a batch of Parquet
_USUAL_BATCH = 1 << 27  # bytes, if the rows of a group are of similar size
_BUFFER_BYTES = 1 << 14  # of a column, after which its memory is looked at
HEAD_ITEMS = 100_000  # columns, or row groups; each takes two kilobytes of memory
HEAD_TEXT = 1 << 24  # bytes of a name, or of what other tools note in a file


def parquet_reader(path: Path) -> Reader:
    """Read a Parquet file, some rows of a row group at a time."""

    def count() -> int:
        with open_parquet(path) as file:
            return file.metadata.num_rows

    return Reader(
        lambda start: _parquet_rows(path, start),
        lambda: (sha256_of_file(path), count()),
        finds_rows=True,
    )


def _parquet_rows(path: Path, start: int) -> Lines:
    with open_parquet(path) as file:
        row = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            if row + facts.num_rows > start:
                batches = parquet_batches(path, file, group, _batch_size(facts))
                yield from _batch_rows(batches, row, start)
            row += facts.num_rows


def parquet_batches(
    path: Path, file: "ParquetFile", group: int, rows: int, columns: list[str] | None = None
) -> "Iterator[pa.RecordBatch]":
    """The record batches of a row group, of so many rows. Raises ValueError for too large ones."""
    from .parquet_pages import refuse_page_bombs

    refuse_page_bombs(path, file.metadata.row_group(group))
    yield from file.iter_batches(rows, row_groups=[group], columns=columns)


def open_parquet(path: Path, dictionaries: bool = True) -> "ParquetFile":
    """Open a file whose head is of limited size; its texts are read as `dictionaries`."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    metadata = ParquetFile(
        path, thrift_string_size_limit=HEAD_TEXT, thrift_container_size_limit=HEAD_ITEMS
    ).metadata
    columns = map(metadata.schema.column, range(metadata.num_columns if dictionaries else 0))
    return ParquetFile(
        pa.PythonFile(_Watched(path), "r"),
        metadata=metadata,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
        read_dictionary=[each.path for each in columns if each.physical_type == "BYTE_ARRAY"],
    )


class _Watched(FileIO):
    """A file that is not read on while Arrow holds more than MOST_MEMORY of what was read."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        super().__init__(path)
        self._allocated = pa.total_allocated_bytes
        self._before = self._allocated()

    def read(self, size: int | None = -1, /) -> bytes:
        if self._allocated() - self._before > MOST_MEMORY:
            raise ValueError(f"a row, or several, take more than {MOST_MEMORY:,} bytes")
        return super().read(size) or b""


def _batch_size(group: "RowGroupMetaData") -> int:
    """The number of rows to read at a time, which is smaller for long rows."""
    fitting = _USUAL_BATCH * group.num_rows // max(1, group.total_byte_size)
    return min(max(1, fitting), BATCH_ROWS)


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

    from ....pipeline.format.arrow_limits import refuse_bombs, refuse_stream_bombs

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            refuse_bombs(file, is_shard=False)
            reader = pa.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            refuse_stream_bombs(file)
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _batch_rows(batches: "Iterator[pa.RecordBatch]", row: int, start: int) -> Lines:
    """Yield rows from `start` on of batches whose first row is number `row`."""
    for batch in batches:
        batch.validate(full=True)  # invalid list offsets would crash the process
        for offset in range(max(0, start - row), batch.num_rows, BATCH_ROWS):
            rows = _decoded(batch.slice(offset, BATCH_ROWS))
            yield from enumerate(rows, row + offset + 1)
        row += batch.num_rows


def _decoded(batch: "pa.RecordBatch") -> Iterator[Any]:
    """The rows of a batch, and TOO_LONG in place of those that are longer than a line may be."""
    from .widths import row_bytes

    sizes = row_bytes(batch)
    whole = len(sizes) if sizes.sum() <= LONGEST_LINE else 1
    for first in range(0, len(sizes), whole):
        if sizes[first : first + whole].sum() > LONGEST_LINE:
            yield TOO_LONG
            continue
        yield from map(without_nones, batch.slice(first, whole).to_pylist())
