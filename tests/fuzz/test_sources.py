"""A file of demonstrations, whole or damaged: its rows the same however they are asked for."""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st
from qpipe.stages.demonstrations.sources import RowReader, Source, open_sources

from .inputs import Draw, damaged, fuzz, made_or_refused

Rows = list[dict[str, Any]]
MOST_ROWS = 40


def _lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _zstd(content: bytes) -> bytes:
    """Two frames."""
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


def _parquet(rows: Rows, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7, **options)
    return sink.getvalue()


def _arrow(rows: Rows, new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


TEXTS: dict[str, Callable[[Rows], bytes]] = {
    "x.jsonl": _lines,
    "x.ndjson": lambda rows: b"\xef\xbb\xbf" + _lines(rows).replace(b"\n", b"\r\n\n"),
    "x.json": _array,
}
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": _zstd}
COLUMNS: dict[str, Callable[[Rows], bytes]] = {
    "x.parquet": _parquet,
    "plain.parquet": lambda rows: _parquet(rows, use_dictionary=False, compression="none"),
    "zstd.parquet": lambda rows: _parquet(rows, compression="zstd", data_page_version="2.0"),
    "x.arrow": lambda rows: _arrow(rows, pa.ipc.new_stream),
    "x.ipc": lambda rows: _arrow(rows, pa.ipc.new_file),
}


def row(number: int) -> dict[str, Any]:
    turns = [{"role": role, "content": f"{number}é"} for role in ("user", "assistant")]
    return {"id": f"row {number}", "messages": turns}


@st.composite
def files(draw: Draw) -> tuple[str, bytes, Rows | None]:
    """A name, a content, and the rows that it must hold; None where it is damaged."""
    rows = [row(number) for number in range(draw(st.integers(1, MOST_ROWS)))]
    name = draw(st.sampled_from([*TEXTS, *COLUMNS]))
    is_damaged = draw(st.booleans())
    if name in COLUMNS:
        content = COLUMNS[name](rows)
        return name, draw(damaged(content)) if is_damaged else content, None if is_damaged else rows
    ending = draw(st.sampled_from(list(PACKED)))
    content = TEXTS[name](rows)
    if is_damaged and draw(st.booleans()):
        return name + ending, PACKED[ending](draw(damaged(content))), None
    content = PACKED[ending](content)
    return (
        name + ending,
        draw(damaged(content)) if is_damaged else content,
        None if is_damaged else rows,
    )


def read(source: Source) -> list[Any]:
    """Every row with its line, and what must hold of them."""
    rows = list(source.rows())
    numbers = [line for line, _ in rows]
    assert numbers == sorted(set(numbers))
    assert source.facts.rows == len(rows)
    assert len(source.facts.fingerprint) == 64
    assert same(list(source.rows(len(rows) // 2)), rows[len(rows) // 2 :])
    reader = RowReader([source, source])
    whole = [(source, *each) for each in rows] * 2
    for start, stop in ((1, 3), (0, 5), (len(rows) - 1, len(rows) + 2), (2 * len(rows), 9**9)):
        assert same(list(reader.read(start, stop)), whole[start:stop])
    assert reader.count == len(whole)
    return [value for _, value in rows]


def same(one: Any, other: Any) -> bool:
    """Equal, NaN to NaN as well."""
    return repr(one) == repr(other)


def opened(name: str, content: bytes) -> list[Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return made_or_refused(lambda: read(open_sources([str(path)])[0]))


@fuzz(120, file=files())
def test_files_whole_and_damaged(file: tuple[str, bytes, Rows | None]) -> None:
    name, content, rows = file
    found = opened(name, content)
    if rows is not None:
        assert found is not None
        parsed = [json.loads(each) if isinstance(each, bytes) else each for each in found]
        assert parsed == rows


@fuzz(40, name=st.sampled_from([*COLUMNS, "x.json.gz", "x.jsonl.zst"]), content=st.binary())
def test_files_of_anything(name: str, content: bytes) -> None:
    opened(name, content)
