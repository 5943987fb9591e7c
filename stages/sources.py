"""Where demonstrations come from: files and data sets, read row by row in the order given.

A source is a file (JSON lines or a JSON array, also compressed with gzip or zstd; Parquet; Arrow),
which a URL of fsspec may name too, or a data set of the `datasets` library: a folder, or a name on
the Hugging Face hub, written `NAME[:CONFIG][@SPLIT]` ("HuggingFaceTB/smoltalk:all@train"; the split
is "train" where none is named; a folder takes both too). A path that exists always wins over a
name. A file behind a URL is fetched whole. Only a JSON array is held in memory as a whole. A source
that cannot be read any further is a UserError.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..pipeline.cache import local_version
from ..pipeline.errors import UserError, one_line
from ..pipeline.remote import open_path
from ..pipeline.storage import sha256_of_file

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# a line or row from 1, and what it holds: bytes are JSON to be read
Lines = Iterator[tuple[int, Any]]

BATCH_ROWS = 256  # of a columnar file, turned into Python objects at a time
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where demonstrations come from. `name` is unique among the sources and no path."""

    name: str
    origin: str  # as the user gave it, for messages
    reader: "_Reader"
    known: "Facts | None" = None  # where another process has found them
    opened: "Version" = None  # what the file was when it was opened

    @property
    def finds_rows(self) -> bool:
        """Whether a row is read without those before it."""
        return self.reader.finds_rows

    @cached_property
    def facts(self) -> "Facts":
        """What is known of the whole source; for a file, it is read for this."""
        if self.known is not None:
            return self.known
        with _reading(self.origin):
            return Facts(*self.reader.facts())

    def fingerprint(self) -> str:
        """A sha256 of the content, independent of its path and, for text, of its compression.

        For a data set on the hub: of its name, configuration, split and revision.
        """
        return self.facts.fingerprint

    def count(self) -> int | None:
        """The number of rows; None where nothing but reading them all would tell."""
        return self.facts.rows

    def rows(self, start: int = 0) -> Lines:
        """Rows from `start` on, each with its line. Raises UserError where it is damaged."""
        with _reading(self.origin):
            yield from self.reader.rows(start)

    def refuse_changed(self) -> None:
        """Raises UserError where the file is no longer what was opened, and so fingerprinted."""
        if self.reader.version() != self.opened:
            raise UserError(
                f"demonstrations {self.origin}: changed while they were read: run the same command "
                "again, with another --out if the rows are others now"
            )


Version = tuple[int, ...] | None  # of a file; None where it is not there, or is none


class Facts(NamedTuple):
    """A source's fingerprint, and its number of rows where that is known."""

    fingerprint: str
    rows: int | None


class _Reader(NamedTuple):
    """How a kind of source is read."""

    rows: Callable[[int], Lines]
    facts: Callable[[], tuple[str, int | None]]  # fingerprint and count
    finds_rows: bool = False
    version: Callable[[], Version] = lambda: None


def open_sources(names: Sequence[str]) -> list[Source]:
    """The sources of these names, in their order.

    Raises UserError for one that is missing, of an unknown kind, unreadable or empty.
    """
    sources: list[Source] = []
    for name in names:
        source = _open(name)
        if next(source.rows(), None) is None:
            raise UserError(f"demonstrations {name}: empty, there is no row in it")
        taken = {earlier.name for earlier in sources}
        sources.append(replace(source, name=_unique(source.name, taken)))
    return sources


def rows_from(sources: Sequence[Source], start: int) -> Iterator[tuple[Source, int, Any]]:
    """Every row of all sources from row `start` on: its source, its line, what it holds."""
    for source in sources:
        count = source.count() if start else 0
        if count is None:  # only reading tells where such a source ends
            for line, raw in source.rows():
                if start:
                    start -= 1
                else:
                    yield source, line, raw
            continue
        if start == 0 or start < count:
            for line, raw in source.rows(start):
                yield source, line, raw
        start = max(0, start - count)


class RowReader:
    """Rows of all sources by their numbers, from 0: cheap as long as these ascend.

    What lies between is passed over without being parsed, or not read at all where a source's
    format allows that.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._rows: Iterator[tuple[Source, int, Any]] | None = None
        self._next = 0  # the row that comes next, of those open
        self._end: int | None = None

    @property
    def count(self) -> int | None:
        """The number of rows; None where only reading tells, and has not yet come to the end."""
        counts = [source.count() for source in self.sources]
        known = [number for number in counts if number is not None]
        return sum(known) if len(known) == len(counts) else self._end

    def read(self, start: int, stop: int) -> list[tuple[Source, int, Any]]:
        """Rows `start` to `stop` - 1, fewer at the end: source, line, and what each holds.

        Raises UserError where a file has changed since it was opened.
        """
        behind = start < self._next
        ahead = start > self._next and all(source.finds_rows for source in self.sources)
        if self._rows is None or behind or ahead:
            self._next = 0 if self.count is None else start
            self._rows = rows_from(self.sources, self._next)
        self._next += sum(1 for _ in islice(self._rows, start - self._next))
        rows = list(islice(self._rows, stop - start))
        self._next += len(rows)
        for source in self.sources:
            source.refuse_changed()
        if len(rows) < stop - start and self.count is None:
            self._end = self._next
        return rows


def _open(name: str) -> Source:
    if not name:
        raise UserError("--demonstrations is empty: give a file or a data set")
    path = open_path(name)
    if "://" in name and not path.is_file():
        raise UserError(f"demonstrations {name}: no such file: of URLs, only a file's can be read")
    if path.exists() and not path.is_dir():
        reader = _file_reader(path)
        return Source(path.name, name, reader, opened=reader.version())
    data_set, config, split = (name, None, "train") if path.exists() else _parts(name)
    folder = Path(data_set)
    if folder.is_dir():
        options = name[len(data_set) :]
        reader = _folder_reader(folder.resolve(), config, split)
        return Source(folder.resolve().name + options, name, reader)
    if _looks_like_file(name):
        raise UserError(f"demonstrations {name}: no such file")
    return Source(name, name, _hub_reader(data_set, config, split))


def _parts(name: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set."""
    parts = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", name)
    if parts is None:
        raise UserError(
            f"demonstrations {name}: neither a file nor a data set, NAME[:CONFIG][@SPLIT]"
        )
    return parts[1], parts[2], parts[3] or "train"


def _looks_like_file(name: str) -> bool:
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return is_path or _suffix(path)[0] in (*FILE_KINDS, *OTHER_FILES)


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}#{number}" for number in range(2, len(taken) + 2))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def _file_reader(path: Path) -> _Reader:
    suffix, compression = _suffix(path)
    kind = FILE_KINDS.get(suffix)
    if kind is None or (compression and kind is not _json_reader):
        raise UserError(
            f"demonstrations {path}: unknown kind of file {path.suffix!r}; known are "
            f"{', '.join(FILE_KINDS)}, those of JSON also with {' or '.join(COMPRESSIONS)} after it"
        )
    local = local_version(path)
    return kind(local)._replace(version=lambda: _version(local))


def _version(path: Path) -> Version:
    with suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _suffix(path: Path) -> tuple[str, str]:
    """The suffix that tells the kind of a file, and that of its compression or ""."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


@contextmanager
def _reading(origin: str) -> Iterator[None]:
    """Turns what the libraries raise about a damaged or unreachable source into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zlib, zstd, Arrow and the hub each have their own
        raise UserError(f"demonstrations {origin}: cannot be read: {one_line(error)}") from error


def _json_reader(path: Path) -> _Reader:
    if _suffix(path)[0] == ".json" and _starts_array(path):
        return _Reader(lambda start: _array_rows(path, start), lambda: _array_facts(path))
    return _Reader(lambda start: _text_rows(path, start), lambda: _text_facts(path))


def _text_lines(path: Path) -> Iterator[bytes]:
    """All lines, the mark of UTF-8 that some editors put before the first one left out."""
    for number, line in enumerate(_raw_lines(path)):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, decompressed."""
    with path.open("rb") as file:
        match _suffix(path)[1]:
            case ".gz":
                yield from gzip.GzipFile(fileobj=file)
            case ".zst":
                yield from _split_lines(_zstd_chunks(file))
            case _:
                yield from file


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of one zstd frame after another, with windows as long as the format allows."""
    from zstandard import ZstdDecompressor

    decompressor = ZstdDecompressor(max_window_size=2**31)
    frame = None
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed file ends too early")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _text_rows(path: Path, start: int) -> Lines:
    lines = enumerate(_text_lines(path), 1)
    yield from islice(((number, line) for number, line in lines if line.strip()), start, None)


def _text_facts(path: Path) -> tuple[str, int]:
    digest = sha256()
    count = 0
    for line in _text_lines(path):
        digest.update(line)
        count += bool(line.strip())
    return digest.hexdigest(), count


def _starts_array(path: Path) -> bool:
    with _reading(str(path)):
        return next(
            (line.lstrip()[:1] == b"[" for line in _text_lines(path) if line.strip()), False
        )


def _load_array(path: Path) -> list[Any]:
    return json.loads(b"".join(_text_lines(path)).decode("utf-8"))


def _array_rows(path: Path, start: int) -> Lines:
    yield from islice(enumerate(_load_array(path), 1), start, None)


def _array_facts(path: Path) -> tuple[str, int]:
    return _text_facts(path)[0], len(_load_array(path))


def _parquet_reader(path: Path) -> _Reader:
    return _Reader(lambda start: _parquet_rows(path, start), lambda: _parquet_facts(path), True)


def _parquet_rows(path: Path, start: int) -> Lines:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row + size > start:
                batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
                yield from _batch_rows(batches, row, start)
            row += size


def _parquet_facts(path: Path) -> tuple[str, int]:
    from pyarrow.parquet import read_metadata

    return sha256_of_file(path), read_metadata(path).num_rows


def _arrow_reader(path: Path) -> _Reader:
    return _Reader(lambda start: _arrow_rows(path, start), lambda: _arrow_facts(path), True)


def _arrow_rows(path: Path, start: int) -> Lines:
    yield from _batch_rows(_arrow_batches(path), 0, start)


def _arrow_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    """The batches of an Arrow file, in either of the two IPC formats; mapped, not read."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _arrow_facts(path: Path) -> tuple[str, int]:
    return sha256_of_file(path), sum(batch.num_rows for batch in _arrow_batches(path))


def _batch_rows(batches: "Iterator[pa.RecordBatch]", row: int, start: int) -> Lines:
    """Rows from `start` on of batches of which the first one begins at `row`."""
    for batch in batches:
        batch.validate(full=True)  # or lists that point astray would end the process
        for offset in range(max(0, start - row), batch.num_rows, BATCH_ROWS):
            rows = batch.slice(offset, BATCH_ROWS).to_pylist()
            yield from enumerate(map(_without_nones, rows), row + offset + 1)
        row += batch.num_rows


def _without_nones(value: Any) -> Any:
    """A value without its absent fields: a column of structs has those of all rows in each row."""
    if isinstance(value, dict):
        return {key: _without_nones(field) for key, field in value.items() if field is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


def _folder_reader(path: Path, config: str | None, split: str) -> _Reader:
    return _data_set_reader(
        lambda: _load_folder(path, config, split),
        lambda: _digest(config, split, *_file_digests(path)),
    )


def _hub_reader(name: str, config: str | None, split: str) -> _Reader:
    @cache
    def load() -> "tuple[datasets.IterableDataset, str | None]":
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(name, config)
            return builder.as_streaming_dataset(split), builder.hash  # pyright: ignore[reportReturnType]
        except Exception as error:  # the hub, the network and the data set each have their own
            raise UserError(
                f"demonstrations {name}: no such file, and no data set that can be loaded "
                f"(NAME[:CONFIG][@SPLIT]): {one_line(error)}"
            ) from error

    return _data_set_reader(lambda: load()[0], lambda: _digest(name, config, split, load()[1]))


def _data_set_reader(
    load: "Callable[[], datasets.Dataset | datasets.IterableDataset]",
    fingerprint: Callable[[], str],
) -> _Reader:
    def rows(start: int) -> Lines:
        yield from enumerate(map(_without_nones, load().skip(start)), start + 1)

    return _Reader(rows, lambda: (fingerprint(), _data_set_size(load())))


def _load_folder(
    path: Path, config: str | None, split: str
) -> "datasets.Dataset | datasets.IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return load_dataset(str(path), config, split=split, streaming=True)
    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(
            f"demonstrations {path}: no split {split!r}, there are {', '.join(map(str, saved))}: "
            f"name one as {path}@SPLIT"
        )
    return saved[split]


def _data_set_size(data_set: "datasets.Dataset | datasets.IterableDataset") -> int | None:
    from datasets import Dataset

    return len(data_set) if isinstance(data_set, Dataset) else None


def _file_digests(folder: Path) -> Iterator[str]:
    """Name and content of each file in a folder, hidden ones left out."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not any(part.startswith(".") for part in name.parts):
            yield from (name.as_posix(), sha256_of_file(folder / name))


def _digest(*parts: str | None) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()


FILE_KINDS: Mapping[str, Callable[[Path], _Reader]] = {
    ".jsonl": _json_reader,
    ".ndjson": _json_reader,
    ".json": _json_reader,
    ".parquet": _parquet_reader,
    ".arrow": _arrow_reader,
    ".feather": _arrow_reader,
    ".ipc": _arrow_reader,
}
COMPRESSIONS = (".gz", ".zst")
OTHER_FILES = (".csv", ".tsv", ".txt", ".xml", ".yaml", ".zip", ".bz2", ".xz")  # no data set's name
