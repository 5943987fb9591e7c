"""Every kind of source, whole, from the middle, and damaged."""

import csv
import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from qpipe.pipeline.errors import UserError
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.demonstrations.readers.columnar import BATCH_ROWS
from qpipe.stages.demonstrations.readers.files import FILE_KINDS
from qpipe.stages.demonstrations.sources import open_sources
from qpipe.tests.support.rows import (
    ASSISTANT,
    CHAT,
    USER,
    as_lines,
    as_table,
    read,
    read_demonstrations,
    reasons,
    write,
    write_parquet,
)
from qpipe.trainer.models.files import find_model


def rows_of(count):
    return [
        {"id": f"row {i}", "messages": [{**USER, "content": f"{i}?"}, ASSISTANT]}
        for i in range(count)
    ]


def write_stream(path, rows):
    table = as_table(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_ipc_file(path, rows):
    table = as_table(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


def write_split(path, rows):
    data_set = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=data_set, test=data_set.select([0])).save_to_disk(path)


def write_folder(path, rows):
    path.mkdir()
    half = len(rows) // 2
    write(path / "train-0.jsonl", rows[:half])
    write(path / "train-1.jsonl", rows[half:])


def write_csv(path, rows, **options):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows({**row, "messages": json.dumps(row["messages"])} for row in rows)


WRITERS = {
    "x.jsonl": write,
    "x.ndjson": write,
    "x.json": write,
    "array.json": lambda path, rows: write(path, json.dumps(rows, indent=1).encode()),
    "array.json.gz": lambda path, rows: write(path, gzip.compress(json.dumps(rows).encode())),
    "x.jsonl.gz": lambda path, rows: write(path, gzip.compress(as_lines(rows))),
    "x.jsonl.zst": lambda path, rows: write(path, zstandard.compress(as_lines(rows))),
    "x.csv": write_csv,
    "x.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "x.parquet": write_parquet,
    "x.arrow": write_stream,
    "x.ipc": write_ipc_file,
    "x.feather": lambda path, rows: pyarrow.feather.write_feather(
        pa.Table.from_pylist(rows), str(path)
    ),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "splits": write_split,
    "folder": write_folder,
}


def test_every_kind_of_file_is_tried() -> None:
    assert {Path(kind).suffixes[0] for kind in WRITERS if "." in kind} == set(FILE_KINDS)


@pytest.fixture(autouse=True)
def _quiet_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", WRITERS)
class TestEveryKind:
    COUNT = 2 * BATCH_ROWS + 188  # 700: several batches, row groups and chunks

    def test_rows_in_order_and_from_any_row_on(self, tmp_path, kind):
        rows = rows_of(self.COUNT)
        WRITERS[kind](tmp_path / kind, rows)
        (source,) = sources = open_sources([str(tmp_path / kind)])
        found = list(read_demonstrations(sources))
        assert source.name == kind
        assert found == [
            Demonstration(row["id"], row["messages"], None, kind, i)
            for i, row in enumerate(rows, 1)
        ]
        for start in (1, 299, 300, 511, 512, self.COUNT - 1, self.COUNT, self.COUNT + 5):
            assert list(read_demonstrations(sources, start=start)) == found[start:]

    def test_count(self, tmp_path, kind):
        WRITERS[kind](tmp_path / kind, rows_of(9))
        (source,) = open_sources([str(tmp_path / kind)])
        assert source.facts.rows == (None if kind == "folder" else 9)

    def test_fingerprint_is_of_the_content(self, tmp_path, kind):
        WRITERS[kind](tmp_path / kind, rows_of(9))
        (tmp_path / "elsewhere").mkdir()
        copied = tmp_path / "elsewhere" / kind
        copy = shutil.copytree if (tmp_path / kind).is_dir() else shutil.copy
        copy(tmp_path / kind, copied)
        WRITERS[kind](tmp_path / "elsewhere" / f"other-{kind}", rows_of(8))
        names = [tmp_path / kind, copied, tmp_path / "elsewhere" / f"other-{kind}"]
        here, there, other = open_sources([str(name) for name in names])
        assert here.facts.fingerprint == there.facts.fingerprint != other.facts.fingerprint
        assert len(here.facts.fingerprint) == 64


def test_text_has_the_fingerprint_of_its_bytes_whatever_the_compression(tmp_path):
    names = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst")
    for name in names:
        WRITERS[name](tmp_path / name, [CHAT])
    prints = {
        source.facts.fingerprint for source in open_sources([f"{tmp_path}/{n}" for n in names])
    }
    assert prints == {hashlib.sha256(as_lines([CHAT])).hexdigest()}


def test_sources_follow_one_another_and_so_do_their_rows(tmp_path):
    names = ["x.jsonl", "x.parquet", "folder", "x.json"]
    for name in names:
        WRITERS[name](tmp_path / name, rows_of(5))
    sources = open_sources([str(tmp_path / name) for name in names])
    found = list(read_demonstrations(sources))
    assert [row.source for row in found] == [name for name in names for _ in range(5)]
    for start in range(22):
        assert list(read_demonstrations(sources, start=start)) == found[start:]


def test_sources_of_one_name_are_numbered(tmp_path):
    names = [write(tmp_path / folder / "x.jsonl", [CHAT]) for folder in ("a", "b", "c")]
    sources = open_sources([*names, names[0]])
    assert [source.name for source in sources] == ["x.jsonl", "x.jsonl#2", "x.jsonl#3", "x.jsonl#4"]
    assert [row.id for row in read(*names)] == ["x.jsonl:1", "x.jsonl#2:1", "x.jsonl#3:1"]


def test_split_of_a_saved_data_set(tmp_path):
    write_split(tmp_path / "splits", rows_of(3))
    whole, test = open_sources([f"{tmp_path}/splits", f"{tmp_path}/splits@test"])
    assert (whole.facts.rows, test.facts.rows) == (3, 1)
    assert test.name == "splits@test"
    assert whole.facts.fingerprint != test.facts.fingerprint
    with pytest.raises(UserError, match=r"no split 'dev', there are train, test: name one as"):
        open_sources([f"{tmp_path}/splits@dev"])


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "org@train", rows_of(4))
    write(tmp_path / "a:b@c.jsonl", [CHAT])
    assert [source.name for source in open_sources(["org@train", "a:b@c.jsonl"])] == [
        "org@train",
        "a:b@c.jsonl",
    ]


def test_folder_by_a_relative_name(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", rows_of(4))
    monkeypatch.chdir(tmp_path / "folder")
    (source,) = open_sources(["."])
    assert source.name == "folder"


class _Builder:
    """Stands for a data set on the hub."""

    hash = "revision-1"

    def as_streaming_dataset(self, split):
        if split != "train":
            raise ValueError(f"Bad split: {split}")
        return datasets.IterableDataset.from_generator(lambda: iter(rows_of(4)))


class TestHub:
    @pytest.fixture
    def builder(self, monkeypatch):
        asked = []
        builder = _Builder()

        def load(name, config):
            asked.append((name, config))
            return builder

        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        builder.asked = asked
        return builder

    def test_name_and_configuration(self, builder):
        sources = open_sources(["org/chats", "org/chats:small@train"])
        assert builder.asked == [("org/chats", None), ("org/chats", "small")]
        assert [source.name for source in sources] == ["org/chats", "org/chats:small@train"]
        assert [source.facts.rows for source in sources] == [None, None]
        found = list(read_demonstrations(sources))
        assert [row.line for row in found] == [1, 2, 3, 4] * 2
        for start in range(10):
            assert list(read_demonstrations(sources, start=start)) == found[start:]

    def test_fingerprint_is_of_name_and_revision(self, builder):
        def fingerprint(name):
            return open_sources([name])[0].facts.fingerprint

        first = fingerprint("org/chats")
        assert fingerprint("org/chats@train") == first
        assert fingerprint("org/chats:small") != first
        builder.hash = "revision-2"
        assert fingerprint("org/chats") != first

    def test_what_cannot_be_loaded_is_one_line(self, monkeypatch, builder):
        with pytest.raises(UserError, match=r"org/chats: no such file, .*: Bad split: dev"):
            open_sources(["org/chats@dev"])

        def fail(*_):
            raise ConnectionError("no\nnetwork")

        monkeypatch.setattr(datasets, "load_dataset_builder", fail)
        with pytest.raises(UserError, match=r"org/chats: no such file, .*: no network$"):
            open_sources(["org/chats"])

    def test_neither_file_nor_name(self):
        with pytest.raises(UserError, match="a@b@c: neither a file nor a data set"):
            open_sources(["a@b@c"])


@pytest.mark.parametrize(
    "name",
    ["x.jsonl", "x.jsonl.gz", "no/x.parquet", "./x", "/no/x", "~/x", "a/b/c", "x.csv"],
)
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_sources([name])
    assert str(error.value) == f"demonstrations {name}: no such file"


def test_name_that_is_not_utf_8(tmp_path):
    """The manifest could not name it."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    write(path, [CHAT])
    with pytest.raises(UserError, match=r"'caf\\udce9.jsonl': its name is not UTF-8"):
        open_sources([str(path)])
    folder = path.with_suffix("")
    folder.mkdir()
    for refused in (lambda: open_sources([str(folder)]), lambda: find_model(str(folder))):
        with pytest.raises(UserError, match=r"'caf\\udce9': its name is not UTF-8"):
            refused()


def test_device():
    with pytest.raises(UserError, match="unknown kind of file"):
        open_sources(["/dev/null"])


@pytest.mark.parametrize("name", ["x.xml", "x", "x.parquet.gz", "x.gz"])
def test_unknown_kind(tmp_path, name):
    with pytest.raises(UserError, match=r"unknown kind of file .*; known are \.jsonl, "):
        open_sources([write(tmp_path / name, b"a,b")])


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("x.jsonl", bytes),
        ("x.json", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.jsonl.zst", zstandard.compress),
    ],
)
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf\n"])
def test_empty_text(tmp_path, name, compress, content):
    with pytest.raises(UserError, match=r"x\.json.*: empty, it has no rows"):
        open_sources([write(tmp_path / name, compress(content))])


@pytest.mark.parametrize("kind", ["x.parquet", "x.arrow", "x.ipc"])
def test_columns_without_rows(tmp_path, kind):
    schema = pa.schema({"messages": pa.string()})
    WRITERS[kind](tmp_path / kind, schema.empty_table())
    with pytest.raises(UserError, match="empty, it has no rows"):
        open_sources([str(tmp_path / kind)])


def test_array_without_rows(tmp_path):
    with pytest.raises(UserError, match="empty, it has no rows"):
        open_sources([write(tmp_path / "x.json", b"[]")])


@pytest.mark.parametrize("kind", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.ipc", "x.arrow"])
def test_file_cut_short(tmp_path, kind):
    rows = [{**row, "id": os.urandom(50).hex()} for row in rows_of(3000)]
    WRITERS[kind](tmp_path / kind, rows)
    content = (tmp_path / kind).read_bytes()
    name = write(tmp_path / kind, content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=rf"demonstrations .*{kind}: cannot be read: "):
        read(name)


@pytest.mark.parametrize("kind", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.ipc", "x.arrow"])
def test_file_of_another_kind(tmp_path, kind):
    with pytest.raises(UserError, match="cannot be read"):
        read(write(tmp_path / kind, as_lines(rows_of(10))))


def test_parquet_damaged_in_the_middle(tmp_path):
    WRITERS["x.parquet"](tmp_path / "x.parquet", rows_of(3000))
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    (source,) = open_sources([write(tmp_path / "x.parquet", bytes(content))])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_demonstrations([source]))


@pytest.mark.parametrize("kind", ["x.ipc", "x.arrow"])
def test_texts_that_point_astray(tmp_path, kind):
    """Unseen, they would be read far behind the end of the file, which ends the process."""
    WRITERS[kind](tmp_path / kind, [{"prompt": text, "completion": text} for text in ("ab", "cd")])
    content = (tmp_path / kind).read_bytes()
    offsets = np.array([0, 2, 4], "<i4").tobytes()
    assert offsets in content
    astray = np.array([0, 2**30, 2**31 - 1], "<i4").tobytes()
    (tmp_path / kind).write_bytes(content.replace(offsets, astray))
    with pytest.raises(UserError, match="cannot be read"):
        read(str(tmp_path / kind))


@pytest.mark.parametrize("content", [b'[{"a": 1}', b"[\xff]", b"[1] [2]"])
def test_broken_array(tmp_path, content):
    with pytest.raises(UserError, match=r"x\.json: cannot be read"):
        list(open_sources([write(tmp_path / "x.json", content)])[0].rows())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(tmp_path):
    name = write(tmp_path / "x.jsonl", [CHAT])
    os.chmod(name, 0)
    with pytest.raises(UserError, match="cannot be read"):
        open_sources([name])


# --- lines of text -----------------------------------------------------------------------------

LINE = json.dumps(CHAT).encode()


def test_broken_lines_are_rejected_and_the_reading_goes_on(tmp_path):
    lines = [
        LINE,
        b'{"messages": [',
        b"null",
        b'{"messages": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5000 + b"}",
        LINE.replace(b"One.", b"\\ud800"),
        LINE.replace(b"One.", b"\\ud83d\\ude42"),
    ]
    found = reasons(write(tmp_path / "x.jsonl", b"\n".join(lines)))
    assert [line for line, reason in found if reason is None] == [1, 8]
    told = [reason for _, reason in found if reason]
    assert told[0].startswith("not JSON: Expecting value")
    assert told[1].startswith("not an object with fields")
    assert told[2] == "not UTF-8: byte 15 is 0xff"
    assert told[3].startswith("not JSON: ")
    assert told[4].startswith("not JSON: Exceeds the limit")
    assert told[5] == "the text holds half a surrogate pair, \\ud800"


def test_blank_lines_are_no_rows(tmp_path):
    name = write(tmp_path / "x.jsonl", b"\n\n" + LINE + b"\n \t\n" + LINE + b"\n\n")
    (source,) = sources = open_sources([name])
    assert source.facts.rows == 2
    assert [row.line for row in read_demonstrations(sources)] == [3, 5]
    assert [row.line for row in read_demonstrations(sources, start=1)] == [5]


@pytest.mark.parametrize("content", [LINE, LINE + b"\n", b"\xef\xbb\xbf" + LINE, LINE + b"\r\n"])
def test_marks_and_ends_of_lines(tmp_path, content):
    (found,) = read(write(tmp_path / "x.jsonl", content))
    assert isinstance(found, Demonstration)
    assert found.messages == CHAT["messages"]


def test_array_with_a_mark(tmp_path):
    (found,) = read(write(tmp_path / "x.json", b"\xef\xbb\xbf\n [" + LINE + b"]"))
    assert isinstance(found, Demonstration)


def test_characters_that_some_readers_take_for_ends_of_lines(tmp_path):
    row = {"messages": [USER, {**ASSISTANT, "content": "one\u2028two\x85three"}]}
    content = json.dumps(row, ensure_ascii=False).encode()
    assert reasons(write(tmp_path / "x.jsonl", content)) == [(1, None)]


def test_huge_line(tmp_path):
    huge = LINE.replace(b"One.", b"One. " * 2_000_000)
    name = write(tmp_path / "x.jsonl", b"\n".join([LINE, huge, LINE]))
    assert [len(row.messages[1]["content"]) for row in read(name)] == [4, 10_000_000, 4]
