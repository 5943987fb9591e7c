"""Opens the sources of demonstrations, files and data sets, and reads their rows in order.

A source is a file (JSON lines or a JSON array, also compressed with gzip or zstd; Parquet; Arrow),
also at an fsspec URL, or a data set of the `datasets` library: a folder, or a name on the Hugging
Face hub, written `NAME[:CONFIG][@SPLIT]` ("HuggingFaceTB/smoltalk:all@train"; the split defaults to
"train"; a folder takes both too). An existing path takes precedence over a name on the hub. A file
at a URL is fetched as a whole.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from ...pipeline.errors import UserError, one_line, require_utf8
from ...pipeline.storage.remote import open_path, public_name
from .readers.data_sets import folder_reader, hub_reader
from .readers.files import FILE_KINDS, OTHER_FILES, file_reader
from .readers.reader import Lines, Reader, Version
from .readers.text import suffixes


class Facts(NamedTuple):
    """What is known of a whole source.

    `fingerprint` is a sha256 of the content, independent of its path and, for text, of its
    compression. For a data set on the hub it covers name, configuration, split and revision.
    """

    fingerprint: str
    rows: int | None  # None if the number is known only after reading them all


@dataclass(frozen=True)
class Source:
    """A file or data set of demonstrations. `name` is unique among the sources and not a path."""

    name: str
    origin: str  # as the user gave it, for messages
    reader: Reader
    known: Facts | None = None  # given if another process has computed them
    opened: Version = None  # version of the file when it was opened

    @cached_property
    def facts(self) -> Facts:
        """The facts of the source; a file is read once to compute them."""
        if self.known is not None:
            return self.known
        with reading(self.origin):
            return Facts(*self.reader.facts())

    def rows(self, start: int = 0) -> Lines:
        """Yield rows from `start` on, each with its line. Raises UserError for a damaged source."""
        with reading(self.origin):
            yield from self.reader.rows(start)

    def refuse_changed(self) -> None:
        """Raise UserError if the file has changed since it was opened and fingerprinted."""
        if self.reader.version() != self.opened:
            raise UserError(
                f"demonstrations {self.origin}: changed while they were read: run the same command "
                "again, with another --out if the rows are others now"
            )


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Convert what libraries raise for a damaged or unreachable source into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zlib, zstd, Arrow and the hub raise different kinds
        raise UserError(f"demonstrations {origin}: cannot be read: {one_line(error)}") from error


def open_sources(names: Sequence[str]) -> list[Source]:
    """Open the sources of these names, in their order.

    Raises UserError for a source that is missing, of an unknown kind, unreadable or empty.
    """
    sources: list[Source] = []
    for name in names:
        source = _open(name)
        if next(source.rows(), None) is None:
            raise UserError(f"demonstrations {name}: empty, it has no rows")
        taken = {earlier.name for earlier in sources}
        numbered = chain([source.name], (f"{source.name}#{number}" for number in count(2)))
        sources.append(replace(source, name=next(each for each in numbered if each not in taken)))
    return sources


def rows_from(sources: Sequence[Source], start: int) -> Iterator[tuple[Source, int, Any]]:
    """Yield (source, line, content) of every row of all sources from row `start` on."""
    for source in sources:
        size = source.facts.rows if start else 0
        if size is None:  # the end of such a source is found by reading it
            for line, raw in source.rows():
                if start:
                    start -= 1
                else:
                    yield source, line, raw
            continue
        if start == 0 or start < size:
            for line, raw in source.rows(start):
                yield source, line, raw
        start = max(0, start - size)


class RowReader:
    """Random access to the rows of all sources by number, cheap if the numbers ascend.

    Rows in between are skipped unparsed or, if the format allows it, unread.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._rows: Iterator[tuple[Source, int, Any]] | None = None
        self._next = 0  # number of the next row of the open iterator
        self._end: int | None = None

    @property
    def count(self) -> int | None:
        """The number of rows; None if it is known only at the end, which has not been reached."""
        counts = [source.facts.rows for source in self.sources]
        known = [number for number in counts if number is not None]
        return sum(known) if len(known) == len(counts) else self._end

    def read(self, start: int, stop: int) -> Iterator[tuple[Source, int, Any]]:
        """Yield (source, line, content) of rows `start` to `stop` - 1; fewer at the end.

        Raises UserError at their end if a file has changed since it was opened.
        """
        behind = start < self._next
        ahead = start > self._next and all(source.reader.finds_rows for source in self.sources)
        if self._rows is None or behind or ahead:
            self._next = 0 if self.count is None else start
            self._rows = rows_from(self.sources, self._next)
        self._next += sum(1 for _ in islice(self._rows, start - self._next))
        for row in islice(self._rows, stop - self._next):
            self._next += 1
            yield row
        for source in self.sources:
            source.refuse_changed()
        if self._next < stop and self.count is None:
            self._end = self._next


def _open(name: str) -> Source:
    if not name:
        raise UserError("--demonstrations is empty: give a file or a data set")
    path = open_path(name)
    if "://" in name and not path.is_file():
        raise UserError(f"demonstrations {name}: no such file: of URLs, only a file's can be read")
    if path.exists() and not path.is_dir():
        require_utf8("demonstrations", path.name)
        with reading(name):
            reader = file_reader(path)
        return Source(public_name(path), name, reader, opened=reader.version())
    data_set, config, split = (name, None, "train") if path.exists() else _parts(name)
    folder = Path(data_set)
    if folder.is_dir():
        options = name[len(data_set) :]
        require_utf8("demonstrations", folder.resolve().name)
        reader = folder_reader(folder.resolve(), config, split)
        return Source(folder.resolve().name + options, name, reader)
    if _looks_like_file(name):
        raise UserError(f"demonstrations {name}: no such file")
    return Source(name, name, hub_reader(data_set, config, split))


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
    return is_path or suffixes(path)[0] in (*FILE_KINDS, *OTHER_FILES)
