"""Every kind of source and every format, whole, from the middle, and damaged."""

import gzip
import hashlib
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.records import Reject
from qpipe.stages.demonstrations import (
    FORMATS,
    Demonstration,
    TurnWeights,
    WeightedSpan,
    check_readable,
    read_demonstrations,
)
from qpipe.stages.readers.columnar import BATCH_ROWS
from qpipe.stages.sources import open_sources

USER = {"role": "user", "content": "a?"}
ASSISTANT = {"role": "assistant", "content": "One."}
CHAT = {"messages": [USER, ASSISTANT]}


def rows_of(count):
    return [
        {"id": f"row {i}", "messages": [{**USER, "content": f"{i}?"}, ASSISTANT]}
        for i in range(count)
    ]


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


WRITERS = {
    "x.jsonl": write,
    "x.ndjson": write,
    "x.json": write,
    "array.json": lambda path, rows: write(path, json.dumps(rows, indent=1).encode()),
    "array.json.gz": lambda path, rows: write(path, gzip.compress(json.dumps(rows).encode())),
    "x.jsonl.gz": lambda path, rows: write(path, gzip.compress(as_lines(rows))),
    "x.jsonl.zst": lambda path, rows: write(path, zstandard.compress(as_lines(rows))),
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


@pytest.fixture(autouse=True)
def _quiet_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def read(*names, **options):
    return list(read_demonstrations(open_sources(names), **options))


def read_row(tmp_path, row, **options):
    """The demonstration of a row, or why there is none."""
    (found,) = read(write(tmp_path / "x.jsonl", [row]), **options)
    return found.reason if isinstance(found, Reject) else found


# --- kinds of sources --------------------------------------------------------------------------


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
        assert source.count() == (None if kind == "folder" else 9)

    def test_fingerprint_is_of_the_content(self, tmp_path, kind):
        WRITERS[kind](tmp_path / kind, rows_of(9))
        (tmp_path / "elsewhere").mkdir()
        copied = tmp_path / "elsewhere" / kind
        copy = shutil.copytree if (tmp_path / kind).is_dir() else shutil.copy
        copy(tmp_path / kind, copied)
        WRITERS[kind](tmp_path / "elsewhere" / f"other-{kind}", rows_of(8))
        names = [tmp_path / kind, copied, tmp_path / "elsewhere" / f"other-{kind}"]
        here, there, other = open_sources([str(name) for name in names])
        assert here.fingerprint() == there.fingerprint() != other.fingerprint()
        assert len(here.fingerprint()) == 64


def test_text_has_the_fingerprint_of_its_bytes_whatever_the_compression(tmp_path):
    names = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst")
    for name in names:
        WRITERS[name](tmp_path / name, [CHAT])
    prints = {source.fingerprint() for source in open_sources([f"{tmp_path}/{n}" for n in names])}
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
    assert (whole.count(), test.count()) == (3, 1)
    assert test.name == "splits@test"
    assert whole.fingerprint() != test.fingerprint()
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
        assert [source.count() for source in sources] == [None, None]
        found = list(read_demonstrations(sources))
        assert [row.line for row in found] == [1, 2, 3, 4] * 2
        for start in range(10):
            assert list(read_demonstrations(sources, start=start)) == found[start:]

    def test_fingerprint_is_of_name_and_revision(self, builder):
        def fingerprint(name):
            return open_sources([name])[0].fingerprint()

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


# --- sources that cannot be read ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "no/x.parquet", "./x", "/no/x", "~/x", "a/b/c", "x.csv"]
)
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_sources([name])
    assert str(error.value) == f"demonstrations {name}: no such file"


def test_device():
    with pytest.raises(UserError, match="unknown kind of file"):
        open_sources(["/dev/null"])


@pytest.mark.parametrize("name", ["x.csv", "x", "x.parquet.gz", "x.gz"])
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
    with pytest.raises(UserError, match=r"x\.json.*: empty, there is no row in it"):
        open_sources([write(tmp_path / name, compress(content))])


@pytest.mark.parametrize("kind", ["x.parquet", "x.arrow", "x.ipc"])
def test_columns_without_rows(tmp_path, kind):
    schema = pa.schema({"messages": pa.string()})
    WRITERS[kind](tmp_path / kind, schema.empty_table())
    with pytest.raises(UserError, match="empty, there is no row in it"):
        open_sources([str(tmp_path / kind)])


def test_array_without_rows(tmp_path):
    with pytest.raises(UserError, match="empty, there is no row in it"):
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
        open_sources([write(tmp_path / "x.json", content)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(tmp_path):
    name = write(tmp_path / "x.jsonl", [CHAT])
    os.chmod(name, 0)
    with pytest.raises(UserError, match="cannot be read"):
        open_sources([name])


# --- lines of text -----------------------------------------------------------------------------

LINE = json.dumps(CHAT).encode()


def reasons(name):
    """Line and reason of each reject, line and None of each demonstration."""
    return [(row.line, row.reason if isinstance(row, Reject) else None) for row in read(name)]


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
    assert source.count() == 2
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


# --- formats -----------------------------------------------------------------------------------

QUESTION_AND_ANSWER = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be kind."}
FORMAT_ROWS = {
    "messages": [
        (CHAT, QUESTION_AND_ANSWER),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    ],
    "sharegpt": [
        (
            {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "One."}]},
            QUESTION_AND_ANSWER,
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [
                    {"from": "user", "value": "a?", "weight": None},
                    {"from": "Assistant", "value": "One."},
                    {"from": "tool", "value": "1"},
                ],
            },
            [SYSTEM, USER, ASSISTANT, {"role": "tool", "content": "1"}],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "a?"},
                    {"from": "gpt", "value": "One."},
                ]
            },
            [SYSTEM, USER, ASSISTANT],
        ),
    ],
    "alpaca": [
        ({"instruction": "a?", "output": "One."}, QUESTION_AND_ANSWER),
        ({"instruction": "a?", "input": "", "output": "One."}, QUESTION_AND_ANSWER),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be kind."},
            [
                SYSTEM,
                {"role": "user", "content": "Add.\n\n1 1"},
                {"role": "assistant", "content": "2"},
            ],
        ),
    ],
    "prompt-completion": [
        ({"prompt": "a?", "completion": "One."}, QUESTION_AND_ANSWER),
        ({"prompt": "a?", "response": "One."}, QUESTION_AND_ANSWER),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": [USER], "completion": "One."}, QUESTION_AND_ANSWER),
    ],
}
FORMAT_CASES = [(name, *case) for name, cases in FORMAT_ROWS.items() for case in cases]


def test_every_format_is_tested():
    assert list(FORMAT_ROWS) == list(FORMATS)


@pytest.mark.parametrize(("name", "row", "messages"), FORMAT_CASES)
def test_format(tmp_path, name, row, messages):
    for format in ("auto", name):
        found = read_row(tmp_path, row, format=format)
        assert found.messages == messages


@pytest.mark.parametrize(("name", "row", "messages"), FORMAT_CASES)
def test_format_from_columns_of_other_rows(tmp_path, name, row, messages):
    """Arrow gives each row the fields of all rows."""
    other = {"other": 1, "messages": None, "prompt": None} | row
    pyarrow.parquet.write_table(pa.Table.from_pylist([other]), tmp_path / "x.parquet")
    (found,) = read(str(tmp_path / "x.parquet"))
    assert found.messages == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no known format, the fields are none"),
        ({"text": "x", "n": 1}, "no known format, the fields are text, n"),
        ({"prompt": "a?"}, "no known format, the fields are prompt"),
        ({"messages": "a?"}, "messages is not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a?"]}, "messages[0] is not an object"),
        ({"messages": [{"content": "a?"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": 1, "content": "a?"}]}, "messages[0].role is not a name"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is missing"),
        (
            {"messages": [{"role": "user", "content": None}, ASSISTANT]},
            "messages[0].content is missing",
        ),
        (
            {"messages": [{"role": "user", "content": ["a?"]}, ASSISTANT]},
            "messages[0].content is not a string",
        ),
        ({"messages": [USER]}, "no assistant message"),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "messages[1].content, the assistant's answer, is empty",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
            "messages[1].content is missing",
        ),
        ({"conversations": []}, "messages is empty"),
        ({"conversations": ["a?"]}, "conversations[0] is not an object"),
        ({"conversations": [{"value": "a?"}]}, "conversations[0].from is missing"),
        ({"conversations": [{"from": 1, "value": ""}]}, "conversations[0].from is not a name"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing"),
        (
            {"conversations": [{"from": "human", "value": 5}]},
            "conversations[0].value is not a string",
        ),
        ({"instruction": 5, "output": "x"}, "instruction is not a string"),
        ({"instruction": "a?", "input": 5, "output": "x"}, "input is not a string"),
        ({"instruction": "a?", "output": "x", "system": 5}, "system is not a string"),
        ({"prompt": {}, "response": "x"}, "prompt is not a string"),
        ({"prompt": "a?", "response": ""}, "messages[1].content, the assistant's answer, is empty"),
        ({**CHAT, "tools": "{"}, "tools is not JSON: "),
        ({**CHAT, "tools": {"name": "clock"}}, "tools is not a list of objects"),
        ({**CHAT, "tools": ["clock"]}, "tools is not a list of objects"),
    ],
)
def test_row_that_cannot_be_used(tmp_path, row, reason):
    found = read_row(tmp_path, row)
    assert found.startswith(reason) if reason.endswith(": ") else found == reason


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "user", "assistant", "[]", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "spans", "weight"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "instruction", "input", "output", "system"]
FIELDS += ["prompt", "completion", "response", "tools", "id", "weight", "spans", "token_weights"]


@given(rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON, min_size=1))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_row_is_a_demonstration_or_a_reject(tmp_path, rows):
    sources = open_sources([write(tmp_path / "x.jsonl", rows)])
    for format in ("auto", *FORMATS):
        found = list(read_demonstrations(sources, format))
        assert [row.line for row in found] == list(range(1, len(rows) + 1))


def test_unknown_speaker(tmp_path):
    reason = read_row(tmp_path, {"conversations": [{"from": "narrator", "value": "x"}]})
    assert reason.startswith("conversations[0].from is 'narrator', known are system, human, user,")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("messages", "messages is missing"),
        ("sharegpt", "conversations is missing"),
        ("alpaca", "output is missing"),
        ("prompt-completion", "prompt is missing"),
    ],
)
def test_format_that_is_forced(tmp_path, name, reason):
    assert read_row(tmp_path, {"instruction": "a?"}, format=name) == reason


@pytest.mark.parametrize(
    ("value", "id"), [("a", "a"), (7, "7"), (0, "0"), ("", None), (True, None), (1.5, None)]
)
def test_id(tmp_path, value, id):
    assert read_row(tmp_path, CHAT | {"id": value}).id == (id or "x.jsonl:1")


TOOLS = [{"type": "function", "function": {"name": "clock", "default": None}}]
CALL = {"role": "assistant", "tool_calls": [{"name": "clock", "arguments": {"zone": None}}]}


class TestTools:
    def test_as_a_list_or_as_text(self, tmp_path):
        for tools in (TOOLS, json.dumps(TOOLS)):
            assert read_row(tmp_path, CHAT | {"tools": tools}).tools == TOOLS

    def test_no_tools(self, tmp_path):
        for tools in (None, [], "[]", "null"):
            assert read_row(tmp_path, CHAT | {"tools": tools}).tools is None

    def test_a_call_needs_no_content(self, tmp_path):
        for call in (CALL, CALL | {"content": None}, CALL | {"content": ""}):
            found = read_row(tmp_path, {"messages": [USER, call]})
            assert found.messages[1] == CALL | {"content": ""}

    def test_fields_that_columns_fill_with_nothing_are_absent(self, tmp_path):
        calls = [
            {"name": "clock", "arguments": {"zone": "UTC"}},
            {"name": "die", "arguments": {"n": 6}},
        ]
        messages = [USER, {"role": "assistant", "tool_calls": calls}, ASSISTANT]
        write_parquet(tmp_path / "x.parquet", [{"messages": messages}])
        (found,) = read(str(tmp_path / "x.parquet"))
        assert found.messages == [
            USER,
            {"role": "assistant", "content": "", "tool_calls": calls},
            ASSISTANT,
        ]

    def test_half_a_surrogate_pair_in_a_call(self, tmp_path):
        call = {"role": "assistant", "tool_calls": [{"name": "\udc00"}]}
        reason = read_row(tmp_path, {"messages": [USER, call]})
        assert reason == "the text holds half a surrogate pair, \\udc00"

    def test_half_a_surrogate_pair_in_a_field_that_is_not_read(self, tmp_path):
        assert isinstance(read_row(tmp_path, CHAT | {"note": "\udc00"}), Demonstration)


# --- weights -----------------------------------------------------------------------------------

GIVEN = [
    ({"weight": 0}, TurnWeights(0.0)),
    ({"weight": 0.5}, TurnWeights(0.5)),
    ({"spans": [[0, 3]]}, TurnWeights(0.0, ((0, 3, 1.0),))),
    ({"spans": [[2, 4, 0], [0, 2, 3]], "weight": 2}, TurnWeights(2.0, ((0, 2, 3.0), (2, 4, 0.0)))),
    ({"spans": [{"start": 0, "end": 1}]}, TurnWeights(0.0, ((0, 1, 1.0),))),
    ({"spans": [{"start": 0, "end": 1, "weight": 2}]}, TurnWeights(0.0, ((0, 1, 2.0),))),
    ({"spans": [[0.0, 3.0, None]]}, TurnWeights(0.0, ((0, 3, 1.0),))),  # as columns hold them
    ({"spans": []}, TurnWeights(0.0, ())),
    ({"token_weights": [1, 0.5]}, TurnWeights(1.0, tokens=(1.0, 0.5))),
    ({"token_weights": [], "weight": 1e30}, TurnWeights(1e30, tokens=())),
]
WITHOUT = [{}, {"weight": 1}, {"weight": 1.0}, {"weight": None, "spans": None}]


def weighed_rows(fields):
    """Rows of every form in which the answer to a question has these fields."""
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "One.", **fields}]
    return [
        {"messages": [USER, ASSISTANT | fields]},
        {"conversations": turns},
        {"instruction": "a?", "output": "One."} | fields,
        {"prompt": "a?", "completion": "One."} | fields,
        {"prompt": [USER], "response": "One."} | fields,
        {"prompt": [USER], "completion": [ASSISTANT | fields]},
    ]


class TestWeights:
    @pytest.mark.parametrize(("fields", "given"), GIVEN)
    def test_in_every_form_and_not_in_the_messages(self, tmp_path, fields, given):
        for row in weighed_rows(fields):
            found = read_row(tmp_path, row)
            assert found.messages == QUESTION_AND_ANSWER
            assert found.weights == (None, given)

    @pytest.mark.parametrize("fields", WITHOUT)
    def test_that_say_nothing(self, tmp_path, fields):
        for row in weighed_rows(fields):
            found = read_row(tmp_path, row)
            assert found.messages == QUESTION_AND_ANSWER
            assert found.weights == ()

    def test_one_for_each_message(self, tmp_path):
        messages = [USER | {"weight": "?"}, ASSISTANT, USER, ASSISTANT | {"weight": 2}]
        found = read_row(tmp_path, {"messages": messages})
        assert found.messages == QUESTION_AND_ANSWER * 2
        assert found.weights == (None, None, None, TurnWeights(2.0))

    def test_from_columns(self, tmp_path):
        """Arrow makes floats of all numbers of a list, and gives each message every field."""
        spans = [[0, 3], [3, 4, 0.5]]
        write_parquet(tmp_path / "x.parquet", [{"messages": [USER, ASSISTANT | {"spans": spans}]}])
        (found,) = read(str(tmp_path / "x.parquet"))
        assert found.messages == QUESTION_AND_ANSWER
        assert found.weights[1].spans == (WeightedSpan(0, 3, 1.0), WeightedSpan(3, 4, 0.5))
        assert [type(part) for part in found.weights[1].spans[0]] == [int, int, float]

    def test_characters_are_those_of_python(self, tmp_path):
        content = (
            b'{"messages": [%s, {"role": "assistant", "content": "\\ud83d\\ude42x", "spans": %s}]}'
        )
        user = json.dumps(USER).encode()
        assert reasons(write(tmp_path / "x.jsonl", content % (user, b"[[1, 2]]"))) == [(1, None)]
        assert reasons(write(tmp_path / "x.jsonl", content % (user, b"[[1, 3]]"))) == [
            (1, "messages[1].spans[0] is [1, 3]: it ends after the 2 characters of the content")
        ]

    @pytest.mark.parametrize("key", ["spans", "token_weights"])
    def test_of_a_message_that_is_not_an_assistant_s(self, tmp_path, key):
        for i, messages in enumerate(([USER | {key: [[0, 1]]}], [USER, SYSTEM | {key: [1]}])):
            reason = read_row(tmp_path, {"messages": [*messages, ASSISTANT]})
            assert reason == f"messages[{i}].{key}: only an assistant's message can carry {key}"
        turns = [{"from": "human", "value": "a?", key: [1]}, {"from": "gpt", "value": "One."}]
        reason = read_row(tmp_path, {"conversations": turns})
        assert reason == f"messages[0].{key}: only an assistant's message can carry {key}"
        empty = [USER | {key: []}, ASSISTANT]
        assert read_row(tmp_path, {"messages": empty}).weights == ()

    @pytest.mark.parametrize("field", [{"weight": 2}, {"spans": []}, {"token_weights": [1]}])
    def test_beside_whole_messages(self, tmp_path, field):
        """Whose they are is not said, and what is said must not be lost."""
        (name,) = field
        for row in (CHAT, {"conversations": []}, {"prompt": "a?", "completion": [ASSISTANT]}):
            beside = list(row)[-1]
            assert read_row(tmp_path, row | field) == (
                f"{name} stands beside {beside}: put it into the assistant's message that it "
                "belongs to"
            )
            assert "beside" not in str(read_row(tmp_path, row | {name: None}))

    @pytest.mark.parametrize(
        "value", [True, -1, -0.001, float("nan"), float("inf"), "1", [1], {}, 10**400, 3.5e38]
    )
    def test_no_weight(self, tmp_path, value):
        for fields, name in (
            ({"weight": value}, "weight"),
            ({"token_weights": [1, value]}, "token_weights[1]"),
            ({"spans": [[0, 1], [1, 2, value]]}, "spans[1].weight"),
            ({"spans": [{"start": 0, "end": 1, "weight": value}]}, "spans[0].weight"),
        ):
            reason = read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]})
            assert reason.startswith(f"messages[1].{name} is ")
            assert reason.endswith(": give a number from 0 to 1e+30")
            assert len(reason) < 150

    @pytest.mark.parametrize(
        ("spans", "reason"),
        [
            ({"start": 0}, " is {'start': 0}: give a list of [start, end, weight]"),
            (3, " is 3: give a list of [start, end, weight]"),
            ([3], "[0] is 3: give [start, end], [start, end, weight], or these by name"),
            ([[3]], "[0] is [3]: give [start, end], [start, end, weight], or these by name"),
            (
                [[0, 1, 1, 1]],
                "[0] is [0, 1, 1, 1]: give [start, end], [start, end, weight], or these by name",
            ),
            (
                [{"start": 0, "end": 1, "weigth": 2}],
                "[0] is {'end': 1, 'start': 0, 'weigth': 2}: give [start, end], [start, end, "
                "weight], or these by name",
            ),
            ([{"start": 0}], "[0] is {'start': 0}: start and end must be whole numbers"),
            ([[0, 1.5]], "[0] is [0, 1.5]: start and end must be whole numbers"),
            ([[False, 1]], "[0] is [False, 1]: start and end must be whole numbers"),
            ([["0", 1]], "[0] is ['0', 1]: start and end must be whole numbers"),
            ([[0, 1], [-1, 1]], "[1] is [-1, 1]: it starts before the content does"),
            ([[3, 5]], "[0] is [3, 5]: it ends after the 4 characters of the content"),
            ([[2, 2]], "[0] is [2, 2]: it holds no character, its end must be above its start"),
            ([[3, 2]], "[0] is [3, 2]: it holds no character, its end must be above its start"),
            (
                [[2, 4], [0, 3]],
                ": [0, 3] and [2, 4] overlap: give each character one weight",
            ),
            ([[1, 2], [1, 2]], ": [1, 2] and [1, 2] overlap: give each character one weight"),
        ],
    )
    def test_no_spans(self, tmp_path, spans, reason):
        found = read_row(tmp_path, {"messages": [USER, ASSISTANT | {"spans": spans}]})
        assert found == f"messages[1].spans{reason}"

    def test_no_list_of_weights(self, tmp_path):
        for value in (1, {"0": 1}, "1"):
            fields = {"token_weights": value}
            reason = read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]})
            assert reason == (
                f"messages[1].token_weights is {value!r}: give a list of numbers, one for a token"
            )

    def test_by_token_and_by_character(self, tmp_path):
        fields = {"token_weights": [1], "spans": [[0, 1]]}
        assert read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]}) == (
            "messages[1] has both spans and token_weights: leave one of them out"
        )


# --- the early check ---------------------------------------------------------------------------


class TestCheckReadable:
    def test_one_usable_row_is_enough(self, tmp_path):
        check_readable(open_sources([write(tmp_path / "x.jsonl", [{}] * 150 + [CHAT])]))

    def test_no_usable_row(self, tmp_path):
        good = write(tmp_path / "good.jsonl", [CHAT])
        name = write(tmp_path / "x.jsonl", [{"text": "x"}] * 150)
        with pytest.raises(UserError) as error:
            check_readable(open_sources([good, name]))
        assert str(error.value) == (
            f"demonstrations {name}: none of its rows could be used; the first: line 1: "
            "no known format, the fields are text; formats are messages, sharegpt, alpaca, "
            "prompt-completion, name one with --format"
        )

    def test_format_that_is_forced(self, tmp_path):
        sources = open_sources([write(tmp_path / "x.jsonl", [CHAT])])
        with pytest.raises(
            UserError, match=r"none of its rows .* line 1: conversations is missing"
        ):
            check_readable(sources, "sharegpt")
