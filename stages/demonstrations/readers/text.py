"""Readers of text: JSON, one value per line or one array, and CSV, also compressed."""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import IO, Any

from .reader import Lines, Reader

COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
LONGEST_LINE = 1 << 25  # bytes; a conversation of a million tokens takes a fifth
MOST_OF_ARRAY = 1 << 30  # bytes; parsed, an array takes several times its size
_ZSTD_BYTES = 1 << 10  # decompressed at once, to at most 32 MiB
_USUAL_WINDOW, _ANY_WINDOW = 1 << 27, 1 << 31  # bytes; zstd itself asks for --long above the first
_LARGE_FILE = 1 << 24


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
    csv.field_size_limit(LONGEST_LINE)
    lines = (_refuse_long(line).decode("utf-8") for line in _text_lines(path))
    delimiter = "\t" if suffixes(path)[0] == ".tsv" else ","
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"line {rows.line_num} has another number of fields than the first")
        yield number, {name: value for name, value in row.items() if value}


def _refuse_long(line: bytes) -> bytes:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"a line is longer than {LONGEST_LINE:,} bytes")
    return line


def _text_lines(path: Path) -> Iterator[bytes]:
    """All lines; of a line above LONGEST_LINE, one byte more than that."""
    return _split_lines(_content(path))


def _content(path: Path) -> Iterator[bytes]:
    """The text in small chunks, decompressed if necessary, without a UTF-8 byte order mark."""
    with path.open("rb") as file:
        match suffixes(path)[1]:
            case ".gz":
                chunks = _chunks(gzip.GzipFile(fileobj=file))
            case ".zst":
                chunks = _zstd_chunks(file, path.stat().st_size)
            case _:
                chunks = _chunks(file)
        for number, chunk in enumerate(chunks):
            yield chunk.removeprefix(b"\xef\xbb\xbf") if number == 0 else chunk


def _chunks(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _zstd_chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The content of all zstd frames, in small chunks whatever the frames expand to.

    Files large enough to profit from it may use windows as long as the format allows, which take
    that much memory.
    """
    from zstandard import ZstdDecompressor

    window = _ANY_WINDOW if size > _LARGE_FILE else _USUAL_WINDOW
    decompressor = ZstdDecompressor(max_window_size=window)
    frame = None
    while chunk := file.read(_ZSTD_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            content = frame.decompress(chunk)
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed file ends too early")


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


def _load_array(path: Path) -> list[Any]:
    content = bytearray()
    for chunk in _content(path):
        content += chunk
        if len(content) > MOST_OF_ARRAY:
            raise ValueError(
                f"a JSON array of more than {MOST_OF_ARRAY:,} bytes: give JSON lines (jq -c '.[]')"
            )
    return json.loads(content.decode("utf-8"))
