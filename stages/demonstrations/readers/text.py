"""Readers of text: JSON, one value per line or one array, and CSV, also compressed."""

import csv
import gzip
import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from .reader import Lines, Reader

COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix of a file's kind, and the suffix of its compression or ""."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def json_reader(path: Path) -> Reader:
    """Read JSON lines or, in a .json file, an array, which is held in memory as a whole."""
    if suffixes(path)[0] == ".json" and _starts_array(path):
        return Reader(
            lambda start: islice(enumerate(_load_array(path), 1), start, None),
            lambda: (_text_facts(path)[0], len(_load_array(path))),
        )
    return Reader(lambda start: _text_rows(path, start), lambda: _text_facts(path))


def csv_reader(path: Path) -> Reader:
    """Read a CSV or TSV file, whose first row names the fields; an empty field is absent."""
    return Reader(
        lambda start: islice(_csv_rows(path), start, None),
        lambda: (_text_facts(path)[0], sum(1 for _ in _csv_rows(path))),
    )


def _csv_rows(path: Path) -> Lines:
    csv.field_size_limit(1 << 31)
    lines = (line.decode("utf-8") for line in _text_lines(path))
    delimiter = "\t" if suffixes(path)[0] == ".tsv" else ","
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"line {rows.line_num} has another number of fields than the first")
        yield number, {name: value for name, value in row.items() if value}


def _text_lines(path: Path) -> Iterator[bytes]:
    """All lines, without a UTF-8 byte order mark before the first."""
    for number, line in enumerate(_raw_lines(path)):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, decompressed if necessary."""
    with path.open("rb") as file:
        match suffixes(path)[1]:
            case ".gz":
                yield from gzip.GzipFile(fileobj=file)
            case ".zst":
                yield from _split_lines(_zstd_chunks(file))
            case _:
                yield from file


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of all zstd frames, with windows as long as the format allows."""
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
    filled = ((number, line) for number, line in enumerate(_text_lines(path), 1) if line.strip())
    return islice(filled, start, None)


def _text_facts(path: Path) -> tuple[str, int]:
    digest = sha256()
    count = 0
    for line in _text_lines(path):
        digest.update(line)
        count += bool(line.strip())
    return digest.hexdigest(), count


def _starts_array(path: Path) -> bool:
    first = next((line for line in _text_lines(path) if line.strip()), b"")
    return first.lstrip().startswith(b"[")


def _load_array(path: Path) -> list[Any]:
    return json.loads(b"".join(_text_lines(path)).decode("utf-8"))
