"""Parquet and Arrow files that are small and decode to any size: refused, or read row by row."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.demonstrations.readers import columnar, parquet_pages
from qpipe.stages.demonstrations.readers.widths import row_bytes
from qpipe.stages.demonstrations.sources import open_sources

LONG = "x" * 30_000_000  # a line may have 33,554,432
MOST_MEMORY = 250  # MB above what the interpreter and Arrow take

READ = """
import sys
from pathlib import Path
from qpipe.pipeline.errors import UserError
from qpipe.stages.demonstrations.readers.reader import TOO_LONG
from qpipe.stages.demonstrations.sources import open_sources

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

list(open_sources(sys.argv[1:2])[0].rows())
before = peak()
for name in sys.argv[2:]:
    try:
        (source,) = open_sources([name])
        print([row is not TOO_LONG for _, row in source.rows()].count(True), source.facts.rows)
    except UserError as error:
        print(error)
print(peak() - before)
"""


def read_in_a_child(small: Path, *paths: Path) -> list[str]:
    """What reading these files says; little memory is taken."""
    command = [sys.executable, "-c", READ, str(small), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    *said, megabytes = done.stdout.splitlines()
    assert int(megabytes) < MOST_MEMORY
    return said


def in_arrow(path: Path, batch: pa.RecordBatch, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    opened = pa.ipc.new_stream if path.suffix == ".ipc" else pa.ipc.new_file
    with opened(path, batch.schema, options=options) as file:
        file.write_batch(batch)
    return path


def in_parquet(path: Path, batch: pa.RecordBatch, **options: Any) -> Path:
    parquet.write_table(pa.Table.from_batches([batch]), path, **options)
    return path


def one_column(array: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([array], ["text"])


def repeated(count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [LONG])


def in_one_row(array: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays([0, len(array)], array)


def test_small_files_that_decode_to_any_size_take_little_memory(tmp_path: Path) -> None:
    _, view, data = pa.array([LONG], pa.string_view()).buffers()
    view = pa.py_buffer(view.to_pybytes()[:16] * 10)
    views = pa.Array.from_buffers(pa.string_view(), 10, [None, view, data])
    zeros = one_column(pa.array(np.zeros(2**25)))
    text = one_column(pa.array(["x" * 2**27]))
    zipped = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    files = {
        "rows.parquet": lambda path: in_parquet(path, one_column(repeated(10))),
        "row.parquet": lambda path: in_parquet(path, one_column(in_one_row(repeated(9999)))),
        "page.parquet": lambda path: in_parquet(path, text, **zipped),
        "rows.arrow": lambda path: in_arrow(path, one_column(repeated(10))),
        "row.arrow": lambda path: in_arrow(path, one_column(in_one_row(repeated(9999)))),
        "views.arrow": lambda path: in_arrow(path, one_column(views)),
        "nulls.arrow": lambda path: in_arrow(path, one_column(in_one_row(pa.nulls(2**31 - 1)))),
        "zeros.arrow": lambda path: in_arrow(path, zeros, "zstd"),
        "zeros.ipc": lambda path: in_arrow(path, zeros, "zstd"),
    }
    small = in_parquet(tmp_path / "small.parquet", one_column(pa.array(["a"])))
    paths = [make(tmp_path / name) for name, make in files.items()]
    said = dict(zip(files, read_in_a_child(small, *paths), strict=True))
    assert said["rows.parquet"] == said["rows.arrow"] == said["views.arrow"] == "10 10"
    assert said["row.parquet"] == said["row.arrow"] == said["nulls.arrow"] == "0 1"
    assert "column text: a page of" in said["page.parquet"]
    assert "unpacks to 134,217,7" in said["page.parquet"]
    for name in ("zeros.arrow", "zeros.ipc"):
        assert "unpacks to 268,435,456" in said[name]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_that_is_too_long_is_rejected_alone(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "2+2?", "completion": text} for text in ("4", LONG + "x" * 2**22, "5")]
    batch = pa.RecordBatch.from_pylist(rows)
    path = tmp_path / f"x.{kind}"
    in_parquet(path, batch) if kind == "parquet" else in_arrow(path, batch)
    (source,) = open_sources([str(path)])
    parsed = [parse_row(source, line, raw, "auto") for line, raw in source.rows()]
    assert [isinstance(each, Reject) for each in parsed] == [False, True, False]
    assert isinstance(parsed[1], Reject)
    assert parsed[1].reason == "longer than 33,554,432 bytes, the most of one row"
    assert [line for line, _ in source.rows(1)] == [2, 3]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        list(open_sources([str(path)])[0].rows())
    return str(raised.value)


def test_a_row_of_many_pages_ends_when_it_takes_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pa.array([f"{number} {number}" * 99 for number in range(99_999)])
    path = in_parquet(tmp_path / "x.parquet", one_column(in_one_row(texts)), data_page_size=2**14)
    (source,) = open_sources([str(path)])
    assert len(list(source.rows())) == 1
    monkeypatch.setattr(columnar, "MOST_MEMORY", 1 << 22)
    assert "a row, or several, take more than 4,194,304 bytes" in refused(path)


def test_a_page_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = one_column(in_one_row(pa.array(np.zeros(9999, np.int8))))
    for version in ("1.0", "2.0"):
        path = in_parquet(tmp_path / f"{version}.parquet", batch, data_page_version=version)
        monkeypatch.setattr(parquet_pages, "MOST_VALUES", 9999)
        assert len(list(open_sources([str(path)])[0].rows())) == 1
        monkeypatch.setattr(parquet_pages, "MOST_VALUES", 9998)
        assert "and 9,999 values, above 67,108,864 or 9,998" in refused(path)


def test_a_head_of_many_columns_or_long_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {f"{'c' * 50}{number}": [1] for number in range(20)}
    path = in_parquet(tmp_path / "x.parquet", pa.RecordBatch.from_pydict(columns))
    open_sources([str(path)])
    for name in ("HEAD_ITEMS", "HEAD_TEXT"):
        with monkeypatch.context() as patch:
            patch.setattr(columnar, name, 15)
            assert "Exceeded size limit" in refused(path)


def test_an_encoding_that_repeats_beginnings_is_refused(tmp_path: Path) -> None:
    path = in_parquet(
        tmp_path / "x.parquet",
        one_column(pa.array(["a", "ab"])),
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert "column text: encoded as DELTA_BYTE_ARRAY" in refused(path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["a", None, "", "bcd"]), [9, 8, 8, 11]),
        (pa.array(["a", None, "", "bcd"], pa.large_string()), [9, 8, 8, 11]),
        (pa.array(["a", None, "", "bcd" * 9], pa.string_view()), [9, 8, 8, 35]),
        (pa.array([b"abc", None], pa.binary(3)), [11, 11]),
        (pa.array([1, None], pa.int8()), [8, 8]),
        (pa.nulls(2), [8, 8]),
        (pa.array(["a", None, "bcd"]).dictionary_encode(), [17, 8, 19]),
        (pa.array([["a", "bc"], None, [], ["d"]]), [27, 8, 8, 17]),
        (pa.array([["a", "bc"], None], pa.large_list(pa.large_string())), [27, 8]),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), [24, 24]),
        (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())), [25, 8]),
        (pa.array([{"a": 1, "b": "xyz"}, {"a": None, "b": "q"}]), [27, 25]),
        (pa.array([[{"b": "xyz"}], [{"b": "q"}] * 2, []]), [27, 42, 8]),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)
def test_sizes_are_8_for_a_value_and_those_of_its_texts(
    array: pa.Array, expected: list[int]
) -> None:
    """Also where an array is a part of another."""
    assert row_bytes(one_column(array)).tolist() == expected
    for start in range(len(array) + 1):
        assert row_bytes(one_column(array).slice(start)).tolist() == expected[start:]


def test_a_type_whose_size_is_not_known_is_refused(tmp_path: Path) -> None:
    runs: Callable[..., pa.Array] = pa.RunEndEncodedArray.from_arrays
    path = in_arrow(tmp_path / "x.arrow", one_column(runs([2**40], ["a"]).slice(0, 3)))
    assert "a column of type run_end_encoded" in refused(path)
