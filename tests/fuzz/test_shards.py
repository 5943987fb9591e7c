"""Shards of any content under a seal that fits: rows that can be, or a line that names the row."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from qpipe.pipeline import decoder
from qpipe.pipeline.folders.sealed import open_sealed, read_scores, read_targets
from qpipe.pipeline.format.arrow_limits import refuse_bombs
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.stages.folders.verify import verify
from qpipe.tests.support.examples import VOCAB
from qpipe.tests.support.folders import reseal
from qpipe.trainer.data.stream import open_streams

from .folders import copied, whole
from .inputs import Draw, damaged, fuzz, made_or_refused

READERS = {"score": read_scores, "build-targets": read_targets}
SHARD = "shard-00001.arrow"
numbers = st.integers(-3, 400) | st.sampled_from([2**8, 2**15, 2**16, 2**31 - 1, -(2**31)])
reals = (
    st.floats(-2, 2, width=32)
    | st.floats(width=32)
    | st.sampled_from([0.0, -0.0, 1.0, 1e-45, float("nan"), float("inf"), -float("inf")])
)


@cache
def table_of(stage: str) -> pa.Table:
    return pa.ipc.open_file((whole(stage) / SHARD).read_bytes()).read_all()


def fitting(kind: pa.DataType, value: Any) -> Any:
    """A number as a column of this kind can hold it."""
    if value is None or pa.types.is_floating(kind):
        return value
    dtype = kind.to_pandas_dtype()
    return int(np.array(int(value), np.int64).astype(dtype))


@st.composite
def tables(draw: Draw) -> tuple[str, pa.Table]:
    """A stage, and a shard of its folder with some of the values changed, left out or doubled."""
    stage = draw(st.sampled_from(list(READERS)))
    table = table_of(stage)
    columns = table.to_pydict()
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(list(columns)))
        row = draw(st.integers(0, table.num_rows - 1))
        kind = table.schema.field(name).type
        if name == "id":
            columns[name][row] = draw(st.none() | st.text(max_size=5))
            continue
        values = columns[name][row]
        value = draw(reals if pa.types.is_floating(kind.value_type) else numbers)
        place = draw(st.integers(0, len(values or [])))
        match draw(st.sampled_from(["set", "set", "set", "insert", "remove", "none", "no list"])):
            case "set" if values and place < len(values):
                values[place] = fitting(kind.value_type, value)
            case "insert" if values is not None:
                values.insert(place, fitting(kind.value_type, value))
            case "remove" if values and place < len(values):
                del values[place]
            case "none" if values and place < len(values):
                values[place] = None
            case "no list":
                columns[name][row] = None
    return stage, pa.Table.from_pydict(columns, schema=table.schema)


def check_row(row: Any) -> None:
    """What must hold of a row that verify says nothing against, worked out entry by entry."""
    assert isinstance(row, ScoredExample | TargetExample)
    T, entries = len(row.input_ids), 0
    ids = row.topk_ids if isinstance(row, ScoredExample) else row.support_ids
    probs = np.exp(row.topk_log_probs) if isinstance(row, ScoredExample) else row.support_probs
    assert all(0 <= token < VOCAB for token in (*row.input_ids.tolist(), *ids.tolist()))
    assert sorted(set(row.positions.tolist())) == row.positions.tolist()
    for n, (position, count) in enumerate(zip(row.positions, row.counts, strict=True)):
        assert 1 <= position < T
        own = slice(entries, entries + int(count))
        assert len(set(ids[own].tolist())) == count
        mass = float(probs[own].sum(dtype=np.float64)) + float(row.tail_mass[n])
        assert abs(mass - 1) < 2e-3
        if isinstance(row, TargetExample):
            assert row.input_ids[position] in ids[own]
            assert 0 <= row.trust[n] < 1.002
            assert 0 <= row.weights[n] < np.inf
        else:
            assert np.isfinite(row.observed_log_probs[n])
            assert (np.diff(row.topk_log_probs[own]) <= 0).all()
        entries += int(count)
    assert entries == len(ids) == len(probs)


def read_everywhere(folder: Path, stage: str) -> None:
    """Every reader of a folder's shards."""
    problems = made_or_refused(lambda: list(verify(folder)))
    rows = made_or_refused(lambda: list(READERS[stage](folder)))
    sealed = open_sealed(folder)
    ids = made_or_refused(lambda: list(map(sealed.ids, sealed.shards)))
    if rows is not None:
        assert ids is not None
        assert [each for shard in ids for batch in shard for each in batch] == [r.id for r in rows]
    if problems == []:
        assert rows is not None
        for row in rows:
            check_row(row)
    if stage == "build-targets":
        made_or_refused(lambda: streamed(folder))
    made_or_refused(lambda: decoded(folder, stage))


def streamed(folder: Path) -> None:
    stream, _ = open_streams(open_sealed(folder), 0.0)
    assert sorted(stream.lengths(0, range(len(stream)))) == sorted(
        len(example.input_ids) for example in stream.samples(0, range(len(stream)))
    )


def decoded(folder: Path, stage: str) -> None:
    """As `datasets` reads a shard."""
    table = pa.ipc.open_file((folder / SHARD).read_bytes()).read_all()
    columns = decoder(folder)(table.to_pydict())
    assert columns["id"] == table["id"].to_pylist()


@fuzz(100, drawn=tables())
def test_values_changed(drawn: tuple[str, pa.Table]) -> None:
    stage, table = drawn
    with copied(stage) as folder:
        with pa.ipc.new_file(str(folder / SHARD), table.schema) as writer:
            writer.write_table(table)
        reseal(folder)
        read_everywhere(folder, stage)


@cache
def bytes_of(stage: str) -> bytes:
    return (whole(stage) / SHARD).read_bytes()


shards = st.sampled_from(list(READERS)).flatmap(
    lambda stage: st.tuples(st.just(stage), damaged(bytes_of(stage)))
)


@fuzz(60, drawn=shards)
def test_bytes_changed(drawn: tuple[str, bytes]) -> None:
    stage, content = drawn
    with copied(stage) as folder:
        (folder / SHARD).write_bytes(content)
        reseal(folder)
        made_or_refused(lambda: list(verify(folder)))
        made_or_refused(lambda: list(READERS[stage](folder)))


@fuzz(150, content=st.binary(max_size=300).map(lambda made: b"ARROW1\0\0" + made + b"ARROW1"))
def test_tables_of_anything(content: bytes) -> None:
    """What guards against explosions reads the tables of a file itself, byte by byte."""
    with suppress(pa.ArrowInvalid):
        refuse_bombs(pa.BufferReader(content))
