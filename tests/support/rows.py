"""Rows of demonstrations for tests: written as files, and read back."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.demonstrations.sources import open_sources, rows_from

USER = {"role": "user", "content": "a?"}
ASSISTANT = {"role": "assistant", "content": "One."}
SYSTEM = {"role": "system", "content": "Be kind."}
QUESTION_AND_ANSWER = [USER, ASSISTANT]
CHAT = {"messages": QUESTION_AND_ANSWER}


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path, content):
    """A file of bytes, or of rows as JSON lines."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else as_lines(content))
    return str(path)


def as_table(rows):
    return rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)


def write_parquet(path, rows):
    table = as_table(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=300)


def read_demonstrations(sources, format="auto", start=0):
    """Yield the demonstrations and rejects of all sources from row `start` on."""
    for source, line, raw in rows_from(sources, start):
        yield parse_row(source, line, raw, format)


def read(*names, **options):
    return list(read_demonstrations(open_sources(names), **options))


def read_row(tmp_path, row, **options):
    """The demonstration of a row, or why there is none."""
    (found,) = read(write(tmp_path / "x.jsonl", [row]), **options)
    return found.reason if isinstance(found, Reject) else found


def reasons(name):
    """Line and reason of each reject, line and None of each demonstration."""
    return [(row.line, row.reason if isinstance(row, Reject) else None) for row in read(name)]


def write_chats(path: Path, count: int = 40) -> Path:
    """A file of conversations of 1 to 20 words, and two lines without one after the third."""
    rows = [
        {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}]}
        for text in ("word " * (1 + number % 20) for number in range(count))
    ]
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ["{broken", json.dumps({"messages": []})]
    path.write_text("\n".join(lines) + "\n")
    return path
