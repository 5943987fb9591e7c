"""Other tools' files of log-probabilities: scores that can be, rejects, or a line."""

import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from qpipe.pipeline.folders.sealed import read_scores
from qpipe.stages.exchange import import_scores as importing
from qpipe.stages.exchange.import_scores import import_scores
from qpipe.stages.exchange.settings import Format, ImportSettings, Mass
from qpipe.stages.exchange.topk_rows import IGNORED
from qpipe.stages.folders.verify import verify
from qpipe.tests.support.examples import TOP_K, VOCAB, random_scored

from .inputs import Draw, damaged, fuzz, made_or_refused

Row = dict[str, Any]
MODEL: Any = SimpleNamespace(
    vocab_size=VOCAB, max_length=64, tokenizer_hash="3fa9", name="m", revision=None
)
NESTED = {"target_token_ids", "target_logprobs", "target_mask", "top_ids", "top_logs"}
REALS = {"target_logprobs", "top_logs"}
ODD_COLUMNS = (
    (3, pa.int64()),
    ("x", pa.string()),
    (["x"], pa.list_(pa.string())),
    ([["x"]], pa.list_(pa.list_(pa.string()))),
    ([1.5, 2.0], pa.list_(pa.float64())),
    ([[[1]]], pa.list_(pa.list_(pa.list_(pa.int64())))),
    ({"a": [1]}, pa.struct({"a": pa.list_(pa.int64())})),
    ([1, 2, 3], pa.list_(pa.int64(), 3)),
    ([[1, 2], [3, 4]], pa.list_(pa.list_(pa.int64(), 2))),
    ([True, False], pa.list_(pa.bool_())),
    (None, pa.null()),
    ([[]], pa.list_(pa.list_(pa.int64()))),
)
integers = st.integers(-2, 400) | st.sampled_from([-100, 2**31 - 1, -(2**31), 0, 1])
reals = (
    st.floats(-20, 1)
    | st.floats(width=32)
    | st.sampled_from([0.0, -1e-7, -1e8, -1e9, float("nan"), float("inf"), -float("inf")])
)


def row_of(number: int, format: Format) -> Row:
    """A row as a tool writes it: entries of row r are those of token r + 1."""
    example = random_scored(number)
    T, N = len(example.input_ids), len(example.positions)
    ids, logs = np.zeros((T, TOP_K), np.int64), np.full((T, TOP_K), -1e9)
    ids[example.positions - 1] = example.topk_ids.reshape(N, TOP_K)
    logs[example.positions - 1] = example.topk_log_probs.reshape(N, TOP_K)
    labels = np.full(T, IGNORED)
    labels[example.positions] = example.observed_ids
    row: Row = {
        "id": example.id,
        "input_ids": example.input_ids.tolist(),
        "labels": labels.tolist(),
        "attention_mask": [1] * T,
    }
    if format == "distillkit":
        return row | {"top_ids": ids.tolist(), "top_logs": logs.tolist()}
    mask = np.zeros((T, TOP_K), np.int64)
    mask[example.positions - 1] = 1
    return row | {
        "target_token_ids": ids.tolist(),
        "target_logprobs": logs.tolist(),
        "target_mask": mask.tolist(),
    }


@st.composite
def tables(draw: Draw) -> tuple[Format, pa.Table]:
    """Rows of a format, some of their numbers changed, left out or doubled, in any types."""
    format: Format = draw(st.sampled_from(["axolotl", "distillkit"]))
    rows = [row_of(draw(st.integers(1, 6)), format) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 4))):
        spoil(draw, draw(st.sampled_from(rows)))
    for name in draw(st.sets(st.sampled_from(["labels", "attention_mask", "id"]), max_size=2)):
        for row in rows:
            row.pop(name)
    made = draw(st.sampled_from([pa.list_, pa.large_list]))
    whole = draw(st.sampled_from([pa.int64(), pa.int32(), pa.uint32(), pa.int16()]))
    real = draw(st.sampled_from([pa.float32(), pa.float64(), pa.float16()]))
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "id":
            columns[name] = pa.array(values)
            continue
        kind = made(real if name in REALS else pa.int64())
        columns[name] = pa.array(values, made(kind) if name in NESTED else kind)
        if name not in REALS:
            other = made(made(whole)) if name in NESTED else made(whole)
            columns[name] = columns[name].cast(other, safe=False)
    if draw(st.integers(0, 3)) == 0:
        odd = draw(st.sampled_from(ODD_COLUMNS))
        columns[draw(st.sampled_from(list(columns)))] = pa.array([odd[0]] * len(rows), odd[1])
    return format, pa.table(columns)


def spoil(draw: Draw, row: Row) -> None:
    name = draw(st.sampled_from([name for name in row if name != "id"]))
    values = row[name]
    if values and name in NESTED and draw(st.integers(0, 5)):
        values = draw(st.sampled_from(values)) or values
    is_inner = not values or not isinstance(values[0], list)
    value = draw(reals if name in REALS else integers) if is_inner else []
    place = draw(st.integers(0, len(values)))
    match draw(st.sampled_from(["set", "set", "insert", "remove", "none"])):
        case "set" if place < len(values):
            values[place] = value
        case "insert":
            values.insert(place, value)
        case "remove" if place < len(values):
            del values[place]
        case "none" if place < len(values):
            values[place] = None


def imported(content: bytes, format: Format, mass: Mass | None, top_k: int | None) -> list | None:
    """The examples of what an import makes, which verify finds nothing wrong with."""
    with (
        tempfile.TemporaryDirectory() as root,
        patch.object(importing, "find_model", lambda *_: MODEL),
    ):
        file, out = Path(root) / "rows.parquet", Path(root) / "out"
        file.write_bytes(content)
        settings = ImportSettings(file, format, "m", out, mass=mass, top_k=top_k)
        result = made_or_refused(lambda: import_scores(settings))
        if result is None:
            assert not (out / "manifest.json").exists()
            return None
        assert list(verify(out)) == []
        totals = result.manifest.totals
        assert totals["read"] == pq.read_metadata(file).num_rows
        return list(read_scores(out))


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


masses = st.sampled_from([None, "model", "top-k"])
tops = st.sampled_from([None, 1, TOP_K, TOP_K + 1])


@fuzz(80, drawn=tables(), mass=masses, top_k=tops)
def test_tables_spoilt(drawn: tuple[Format, pa.Table], mass: Mass | None, top_k: int) -> None:
    format, table = drawn
    imported(as_parquet(table), format, mass, top_k)


@fuzz(30, number=st.integers(1, 8), format=st.sampled_from(["axolotl", "distillkit"]))
def test_rows_are_read_as_they_stand_there(number: int, format: Format) -> None:
    table = pa.Table.from_pylist([row_of(number, format)])
    example = random_scored(number)
    known = [
        token in example.topk_ids[TOP_K * n : TOP_K * (n + 1)].tolist()
        for n, token in enumerate(example.observed_ids.tolist())
    ]
    found = imported(as_parquet(table), format, "model", None)
    if not any(known):
        assert found is None
        return
    assert found is not None
    (read,) = found
    assert read.positions.tolist() == example.positions[known].tolist()
    assert read.topk_ids.tolist() == example.topk_ids[np.repeat(known, TOP_K)].tolist()
    np.testing.assert_allclose(
        read.observed_log_probs, example.observed_log_probs[known], rtol=1e-6
    )
    np.testing.assert_allclose(read.tail_mass, example.tail_mass[known], atol=1e-5)


@fuzz(
    40,
    format=st.sampled_from(["axolotl", "distillkit"]),
    edits=st.data(),
)
def test_files_damaged(format: Format, edits: st.DataObject) -> None:
    content = as_parquet(pa.Table.from_pylist([row_of(3, format), row_of(4, format)]))
    imported(edits.draw(damaged(content)), format, None, None)
