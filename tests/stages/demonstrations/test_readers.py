"""Rows by their numbers: the right ones in any order, and how little is read for them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from qpipe.pipeline.errors import UserError
from qpipe.stages.demonstrations.sources import Facts, RowReader, Source, open_sources

ORDERS = [
    [0, 1, 2, 3, 4, 5],  # one process
    [1, 3, 5],  # a task of two
    [0, 4, 2, 5, 1],  # what dead workers leave
    [5, 6, 7],
    [9],  # behind the last
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """23 rows in two files of lines, with a blank one, and 20 in Parquet in groups of 6."""
    rows = [{"number": number} for number in range(43)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:11]]) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[11:23]))
    parquet.write_table(pa.Table.from_pylist(rows[23:]), tmp_path / "c.parquet", row_group_size=6)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.parquet")]


def number(raw: Any) -> int:
    return json.loads(raw)["number"] if isinstance(raw, bytes) else raw["number"]


def unknown(source: Source) -> Source:
    """A source of which only reading to the end tells how many rows it has."""
    return replace(source, known=Facts("0123", None))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("only", [slice(0, 3), slice(0, 2), slice(2, 3)], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_the_rows_asked_for_come(
    files: list[str], only: slice, known: bool, order: list[int]
) -> None:
    sources = open_sources(files[only])
    numbers = {0: range(43), 2: range(23, 43)}[only.start or 0][: 23 if only.stop == 2 else None]
    reader = RowReader(sources if known else [unknown(source) for source in sources])
    for shard in order:
        found = [number(raw) for _, _, raw in reader.read(shard * 5, shard * 5 + 5)]
        assert found == list(numbers[shard * 5 : shard * 5 + 5])
    if known or max(order) * 5 + 5 > len(numbers):
        assert reader.count == len(numbers)
    else:
        assert reader.count is None


def reads(sources: list[Source]) -> tuple[list[Source], list[int]]:
    """The sources, and a list of the rows that are read of them."""
    read: list[int] = []

    def counted(source: Source) -> Source:
        def rows(start: int) -> Any:
            for line, raw in source.reader.rows(start):
                read.append(number(raw))
                yield line, raw

        return replace(source, reader=source.reader._replace(rows=rows))

    return [counted(source) for source in sources], read


def test_lines_are_passed_over_once(files: list[str]) -> None:
    sources, read = reads(open_sources(files[:2]))
    reader = RowReader(sources)
    for shard in (0, 2, 4):
        list(reader.read(shard * 5, shard * 5 + 5))
    assert read == list(range(23))


def test_what_a_format_finds_is_not_read_to_be_passed_over(files: list[str]) -> None:
    sources, read = reads(open_sources(files[2:]))
    reader = RowReader(sources)
    for shard in (0, 2):
        list(reader.read(shard * 5, shard * 5 + 5))
    assert read == [*range(23, 28), *range(33, 38)]


def test_known_facts_save_reading_the_file(files: list[str]) -> None:
    (source,) = open_sources(files[:1])
    facts = source.facts
    Path(files[0]).unlink()
    assert replace(source, known=facts).facts.rows == 11


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", ["removed", "cut", "changed"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    files: list[str], place: int, fault: str
) -> None:
    """Its rows would not be those of its fingerprint."""
    sources = open_sources(files)
    reader = RowReader(sources)
    assert len(list(reader.read(0, 5))) == 5
    path = Path(files[place])
    content = path.read_bytes()
    if fault == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if fault == "cut" else content[:-3] + b"?" + content[-2:])
    with pytest.raises(UserError, match=f"{path.name}: changed while they were read"):
        list(reader.read(5, 10))
