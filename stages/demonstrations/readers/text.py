"""Readers of text: JSON, one value per line or one array, and CSV, also compressed."""

import csv
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

from .compressed import chunks_of
from .json_array import array_values
from .reader import LONGEST_LINE, Lines, Reader

COMPRESSIONS = (".gz", ".zst")


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix of a file's kind, and the suffix of its compression or ""."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def json_reader(path: Path) -> Reader:
    """Read JSON lines or, in a .json file, the values of an array."""
    if suffixes(path)[0] == ".json" and _starts_array(path):
        return Reader(
            lambda start: islice(enumerate(array_values(_content(path)), 1), start, None),
            lambda: (_text_facts(path)[0], sum(1 for _ in array_values(_content(path)))),
        )
    return Reader(lambda start: _text_rows(path, start), lambda: _text_facts(path))


def csv_reader(path: Path) -> Reader:
    """Read a CSV or TSV file, whose first row names the fields; an empty field is absent."""
    return Reader(
        lambda start: islice(_csv_rows(path), start, None),
        lambda: (_text_facts(path)[0], sum(1 for _ in _csv_rows(path))),
    )


def _csv_rows(path: Path) -> Lines:
    csv.field_size_limit(LONGEST_LINE)
    taken = 0  # bytes of the row that is being read, which may have several lines

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in _text_lines(path):
            taken += len(line)
            if taken > LONGEST_LINE:
                raise ValueError(f"a row is longer than {LONGEST_LINE:,} bytes")
            yield line.decode("utf-8")

    delimiter = "\t" if suffixes(path)[0] == ".tsv" else ","
    rows = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    for number, row in enumerate(rows, 1):
        taken = 0
        if None in row or None in row.values():
            raise ValueError(f"line {rows.line_num} has another number of fields than the first")
        yield number, {name: value for name, value in row.items() if value}


def _text_lines(path: Path) -> Iterator[bytes]:
    """All lines; of a line above LONGEST_LINE, one byte more than that."""
    return _split_lines(_content(path))


def _content(path: Path) -> Iterator[bytes]:
    """The text in small chunks, decompressed if necessary, without a UTF-8 byte order mark."""
    with path.open("rb") as file:
        chunks = chunks_of(file, suffixes(path)[1], path.stat().st_size)
        for number, chunk in enumerate(chunks):
            yield chunk.removeprefix(b"\xef\xbb\xbf") if number == 0 else chunk


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = bytearray()
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first[: LONGEST_LINE + 1 - len(rest)]
        if others:
            yield bytes(rest) + b"\n"
            yield from (line + b"\n" for line in others[:-1])
            rest = bytearray(others[-1])
    if rest:
        yield bytes(rest)


def _text_rows(path: Path, start: int) -> Lines:
    filled = ((number, line) for number, line in enumerate(_text_lines(path), 1) if line.strip())
    return islice(filled, start, None)


def _text_facts(path: Path) -> tuple[str, int]:
    digest = sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in _content(path):
            digest.update(chunk)
            yield chunk

    count = sum(bool(line.strip()) for line in _split_lines(hashed()))
    return digest.hexdigest(), count


def _starts_array(path: Path) -> bool:
    first = next((line for line in _text_lines(path) if line.strip()), b"")
    return first.lstrip().startswith(b"[")
