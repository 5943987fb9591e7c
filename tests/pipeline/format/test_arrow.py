"""Records to Arrow and back."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.shards import ShardContent, commit_shard
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import flatten, split
from qpipe.pipeline.format.ragged import segment_sums
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.schema import Schema, schema_of

MakeRecord = Callable[..., Any]
STAGES = ("score", "build-targets")
VOCAB_SIZES = (2, 2**16 - 1, 2**16, 2**16 + 1, 2**31)
SCORE = schema_of("score", 100)


def as_lists(record: Any) -> dict[str, Any]:
    """A record's fields as plain values, with their types."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {
        name: value if name == "id" else (value.dtype.name, value.tolist())
        for name, value in values.items()
    }


def through_arrow(schema: Schema, records: list[Any]) -> list[Any]:
    batch = encode(schema, flatten(schema, records))
    batch.validate(full=True)
    return list(split(schema, decode(schema, batch, "a batch")))


def hand_made() -> list[ScoredExample]:
    """Two examples, of 3 tokens and 2 positions, and of 2 tokens and 1 position."""
    first = ScoredExample(
        id="a",
        input_ids=np.array([5, 6, 7], np.int32),
        positions=np.array([1, 2], np.int32),
        observed_log_probs=np.array([-0.5, -1], np.float32),
        observed_ranks=np.array([1, 9], np.int32),
        counts=np.array([2, 1], np.int32),
        topk_ids=np.array([6, 9, 4], np.int32),
        topk_log_probs=np.array([-0.5, -2, -0.25], np.float32),
        tail_mass=np.array([0.25, 0.125], np.float32),
        token_weights=np.array([1, 0.5], np.float32),
    )
    second = ScoredExample(
        id="b",
        input_ids=np.array([8, 99], np.int32),
        positions=np.array([1], np.int32),
        observed_log_probs=np.array([-3], np.float32),
        observed_ranks=np.array([2], np.int32),
        counts=np.array([2], np.int32),
        topk_ids=np.array([0, 99], np.int32),
        topk_log_probs=np.array([-0.125, -3], np.float32),
        tail_mass=np.array([0], np.float32),
        token_weights=np.array([2], np.float32),
    )
    return [first, second]


def arrow_batch() -> pa.RecordBatch:
    return encode(SCORE, flatten(SCORE, hand_made()))


def with_column(batch: pa.RecordBatch, name: str, values: Any) -> pa.RecordBatch:
    """The batch with one column's values replaced, its schema kept."""
    place = batch.schema.get_field_index(name)
    columns = batch.columns
    columns[place] = pa.array(values, batch.schema.field(name).type)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


shapes = st.lists(
    st.tuples(st.integers(0, 12), st.floats(0, 1)).map(
        lambda drawn: (drawn[0], int(drawn[1] * max(drawn[0] - 1, 0)))
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    stage=st.sampled_from(STAGES),
    vocab_size=st.sampled_from(VOCAB_SIZES),
    shapes=shapes,
    seed=st.integers(0, 2**32 - 1),
)
def test_records_of_any_shape_come_back_as_they_were(
    make_record: MakeRecord,
    stage: str,
    vocab_size: int,
    shapes: list[tuple[int, int]],
    seed: int,
) -> None:
    schema = schema_of(stage, vocab_size)
    rng = np.random.default_rng(seed)
    records = [
        make_record(schema, rng, f"näme {row}", tokens, positions, vocab_size - 1)
        for row, (tokens, positions) in enumerate(shapes)
    ]

    returned = through_arrow(schema, records)

    assert [type(record) for record in returned] == [schema.record] * len(records)
    assert [as_lists(record) for record in returned] == [as_lists(record) for record in records]


@pytest.mark.parametrize(
    ("vocab_size", "stored"),
    [(2**16 - 1, "uint16"), (2**16, "uint16"), (2**16 + 1, "int32"), (2**31, "int32")],
)
@pytest.mark.parametrize("stage", STAGES)
def test_vocabulary_ids_take_two_bytes_where_they_fit(
    stage: str, vocab_size: int, stored: str
) -> None:
    arrow = schema_of(stage, vocab_size).arrow
    ids = [field for field in arrow if field.name.endswith("_ids")]

    assert [str(field.type) for field in ids] == [f"list<item: {stored}>"] * 2


def test_ranks_above_two_bytes_survive_a_small_vocabulary_id(make_record: MakeRecord) -> None:
    record = make_record(SCORE, np.random.default_rng(0), "a", 4, 2, largest=99)
    record.observed_ranks[:] = [2**31 - 1, 70_000]

    assert through_arrow(SCORE, [record])[0].observed_ranks.tolist() == [2**31 - 1, 70_000]


def test_floats_keep_every_bit() -> None:
    example = hand_made()[0]
    example.observed_log_probs[:] = [-np.inf, np.float32(-1e-45)]
    example.topk_log_probs[:] = [np.nan, -0.0, np.float32(0.1)]

    returned = through_arrow(SCORE, [example])[0]

    assert returned.observed_log_probs.tobytes() == example.observed_log_probs.tobytes()
    assert returned.topk_log_probs.tobytes() == example.topk_log_probs.tobytes()


def test_an_example_of_a_hundred_thousand_tokens_comes_back(make_record: MakeRecord) -> None:
    schema = schema_of("score", 2**17)
    rng = np.random.default_rng(0)
    long = make_record(schema, rng, "long", 100_000, 99_999, largest=2**17 - 1)
    short = make_record(schema, rng, "short", 2, 1, largest=2**17 - 1)

    returned = through_arrow(schema, [short, long, short])

    assert [len(record.input_ids) for record in returned] == [2, 100_000, 2]
    assert as_lists(returned[1]) == as_lists(long)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_of_no_rows_comes_back_empty(stage: str) -> None:
    schema = schema_of(stage, 100)
    flat = flatten(schema, [])

    assert through_arrow(schema, []) == []
    assert {name: len(array) for name, array in flat.arrays.items()} == {
        column.name: 0 for column in schema.lists
    }
    assert flat.observed_ids.tolist() == []


def test_a_row_without_positions_comes_back(make_record: MakeRecord) -> None:
    record = make_record(SCORE, np.random.default_rng(0), "a", 3, 0, largest=99)

    assert as_lists(through_arrow(SCORE, [record])[0]) == as_lists(record)


def test_observed_ids_of_a_batch_are_those_of_its_examples() -> None:
    flat = flatten(SCORE, hand_made())

    assert flat.observed_ids.tolist() == [6, 7, 99]
    assert [example.observed_ids.tolist() for example in hand_made()] == [[6, 7], [99]]


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 4), (3, 5), (2, 2), (0, 5)])
def test_a_slice_of_a_record_batch_decodes_to_its_rows(
    make_record: MakeRecord, start: int, stop: int
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(5, 3), (2, 0), (7, 6), (1, 0), (4, 2)]
    records = [make_record(SCORE, rng, str(row), *shape, 99) for row, shape in enumerate(shapes)]
    batch = encode(SCORE, flatten(SCORE, records)).slice(start, stop - start)

    returned = list(split(SCORE, decode(SCORE, batch, "a slice")))

    assert [as_lists(record) for record in returned] == [
        as_lists(record) for record in records[start:stop]
    ]


def test_batches_join_to_the_same_examples_however_they_are_cut(make_record: MakeRecord) -> None:
    rng = np.random.default_rng(1)
    records = [make_record(SCORE, rng, str(row), 5 + row, row, 99) for row in range(7)]
    cuts = [0, 1, 1, 4, 7]

    parts = [through_arrow(SCORE, records[start:stop]) for start, stop in pairwise(cuts)]

    joined = [as_lists(record) for part in parts for record in part]
    assert joined == [as_lists(record) for record in through_arrow(SCORE, records)]


def test_plain_arrow_reads_a_shard_file_as_lists_of_the_documented_types(tmp_path: Path) -> None:
    commit_shard(tmp_path, 0, SCORE, "f", ShardContent([flatten(SCORE, hand_made())]))

    table = pa.ipc.open_file(tmp_path / "shard-00000.arrow").read_all()

    assert table.to_pydict() == {
        "id": ["a", "b"],
        "input_ids": [[5, 6, 7], [8, 99]],
        "positions": [[1, 2], [1]],
        "observed_log_probs": [[-0.5, -1.0], [-3.0]],
        "observed_ranks": [[1, 9], [2]],
        "counts": [[2, 1], [2]],
        "topk_ids": [[6, 9, 4], [0, 99]],
        "topk_log_probs": [[-0.5, -2.0, -0.25], [-0.125, -3.0]],
        "tail_mass": [[0.25, 0.125], [0.0]],
        "token_weights": [[1.0, 0.5], [2.0]],
    }
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "string",
        "input_ids": "list<item: uint16>",
        "positions": "list<item: int32>",
        "observed_log_probs": "list<item: float>",
        "observed_ranks": "list<item: int32>",
        "counts": "list<item: int32>",
        "topk_ids": "list<item: uint16>",
        "topk_log_probs": "list<item: float>",
        "tail_mass": "list<item: float>",
        "token_weights": "list<item: float>",
    }


def test_the_datasets_library_reads_a_shard_file(tmp_path: Path) -> None:
    from datasets import load_dataset

    commit_shard(tmp_path, 0, SCORE, "f", ShardContent([flatten(SCORE, hand_made())]))

    rows = list(
        load_dataset(
            "arrow",
            data_files=str(tmp_path / "shard-00000.arrow"),
            split="train",
            streaming=True,
        )
    )

    assert [row["id"] for row in rows] == ["a", "b"]
    assert [row["topk_ids"] for row in rows] == [[6, 9, 4], [0, 99]]
    assert [row["topk_log_probs"] for row in rows] == [[-0.5, -2.0, -0.25], [-0.125, -3.0]]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("tail_mass", [[0.25], [0.0]], "row 0 ('a'): column tail_mass differs"),
        ("tail_mass", [[0.25, 0.125, 0.0], []], "row 0 ('a'): column tail_mass differs"),
        ("token_weights", [[1, 1], []], "row 1 ('b'): column token_weights differs"),
        ("topk_log_probs", [[-1, -2, -3], [-1]], "row 1 ('b'): column topk_log_probs differs"),
        ("positions", [[1, 2], []], "row 1 ('b'): column observed_log_probs differs"),
        ("counts", [[2, 2], [2]], "row 0 ('a'): column counts does not add up"),
        ("counts", [[2, 1], [1]], "row 1 ('b'): column counts does not add up"),
        ("counts", [[2, 2], [1]], "row 0 ('a'): column counts does not add up"),
        ("counts", [[4, -1], [2]], "row 0 ('a'): column counts is negative"),
        ("positions", [[1, 2], [2]], "row 1 ('b'): column positions is outside"),
        ("positions", [[1, 2], [0]], "row 1 ('b'): column positions is outside"),
        ("positions", [[1, 2], [-1]], "row 1 ('b'): column positions is outside"),
        ("input_ids", [[5, 6, 7], [8, 100]], "row 1 ('b'): column input_ids is outside"),
        ("topk_ids", [[6, 9, 4], [0, 100]], "row 1 ('b'): column topk_ids is outside"),
    ],
)
def test_what_no_reader_could_make_sense_of_is_refused(column: str, values: Any, said: str) -> None:
    damaged = with_column(arrow_batch(), column, values)

    with pytest.raises(UserError) as refused:
        decode(SCORE, damaged, "shard-3, record batch 2")
    assert f"shard-3, record batch 2, {said}" in str(refused.value)


def test_huge_counts_do_not_add_up_by_wrapping_around() -> None:
    """2³¹-1 twice and 5 are 3 in 32 bits, the number of entries; as lengths they take 32 GB."""
    first = hand_made()[0]
    long = replace(
        first,
        input_ids=np.arange(4, dtype=np.int32),
        positions=np.array([1, 2, 3], np.int32),
        counts=np.array([1, 1, 1], np.int32),
        **{
            name: np.ones(3, getattr(first, name).dtype)
            for name in ("observed_log_probs", "observed_ranks", "tail_mass", "token_weights")
        },
    )
    batch = encode(SCORE, flatten(SCORE, [long]))
    with pytest.raises(UserError, match=r"row 0 .*: column counts does not add up"):
        decode(SCORE, with_column(batch, "counts", [[2**31 - 1, 2**31 - 1, 5]]), "a batch")


def test_an_id_in_an_error_is_short_and_on_one_line() -> None:
    damaged = with_column(arrow_batch(), "id", ["\x1b[31m\n" + "x" * 10**6, "b"])

    with pytest.raises(UserError) as refused:
        decode(SCORE, with_column(damaged, "counts", [[2, 2], [2]]), "a batch")

    assert len(str(refused.value)) < 200
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tail_mass", [[0.25, None], [0.0]]),
        ("tail_mass", [None, [0.0]]),
        ("input_ids", [[5, None, 7], [8, 99]]),
        ("input_ids", [[5, 6, 7], None]),
        ("counts", [[2, None], [2]]),
    ],
)
def test_nulls_are_refused_with_the_column_named(column: str, values: Any) -> None:
    damaged = with_column(arrow_batch(), column, values)

    with pytest.raises(UserError, match=f"column {column}"):
        decode(SCORE, damaged, "a batch")


def test_a_missing_id_is_refused() -> None:
    with pytest.raises(UserError, match="column id"):
        decode(SCORE, with_column(arrow_batch(), "id", ["a", None]), "a batch")


def test_a_batch_of_another_schema_is_refused(make_record: MakeRecord) -> None:
    wide = schema_of("score", 2**16 + 1)
    targets = schema_of("build-targets", 100)
    record = make_record(targets, np.random.default_rng(0), "a", 3, 2, 99)
    others = [
        encode(wide, flatten(wide, hand_made())),
        encode(targets, flatten(targets, [record])),
        arrow_batch().drop_columns(["tail_mass"]),
        arrow_batch().append_column("extra", pa.array([1, 2])),
        arrow_batch().select(list(reversed(arrow_batch().schema.names))),
        pa.record_batch({"id": ["a"]}),
    ]
    for other in others:
        with pytest.raises(UserError, match="a batch: its columns are not those"):
            decode(SCORE, other, "a batch")


def test_segment_sums_gives_zero_for_empty_runs() -> None:
    sums = segment_sums(np.array([1, 2, 3, 4]), np.array([0, 2, 0, 0, 1, 1, 0]))

    assert sums.tolist() == [0, 3, 0, 0, 3, 4, 0]


def test_segment_sums_of_nothing_is_nothing() -> None:
    assert segment_sums(np.empty(0), np.empty(0, np.int64)).tolist() == []
    assert segment_sums(np.empty(0), np.zeros(3, np.int64)).tolist() == [0, 0, 0]
