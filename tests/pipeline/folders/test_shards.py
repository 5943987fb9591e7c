"""Shards written whole or not at all, and what reading a damaged one says."""

import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shards import (
    BATCH_ROWS,
    ShardContent,
    batches_of,
    commit_shard,
    committed_shard,
    sidecar_path,
)
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.storage.files import atomic_file
from qpipe.pipeline.storage.json_files import read_json, sha256_of_json, write_json

MakeRecord = Callable[..., Any]
SCHEMA = schema_of("score", 100)


class Breaking(list[FlatBatch]):
    """Batches whose reading fails after the first."""

    def __init__(self, batches: list[FlatBatch], error: BaseException) -> None:
        super().__init__(batches)
        self.error = error

    def __iter__(self) -> Iterator[FlatBatch]:
        yield self[0]
        raise self.error


@pytest.fixture
def content(make_record: MakeRecord) -> ShardContent:
    """Two rows of 6 and 4 tokens, with 3 and 2 positions, in a batch each."""
    rng = np.random.default_rng(0)
    records = [make_record(SCHEMA, rng, "a", 6, 3, 99), make_record(SCHEMA, rng, "b", 4, 2, 99)]
    batches = [batch for record in records for batch in batches_of(SCHEMA, [record])]
    return ShardContent(batches, [Reject("chats.jsonl", 7, "empty")], {"nll": 1.5})


@pytest.fixture
def sealed(undisturbed: Path, tmp_path: Path) -> Path:
    """A sealed folder of the toy's, to be damaged."""
    return Path(copytree(undisturbed, tmp_path / "sealed"))


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_a_committed_shard_is_a_file_and_the_sidecar_that_describes_it(
    tmp_path: Path, content: ShardContent
) -> None:
    entry = commit_shard(tmp_path, 12, SCHEMA, "print", content)

    data = (tmp_path / "shard-00012.arrow").read_bytes()
    counts = [batch["counts"].sum() for batch in content.batches]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00012.arrow",
        "shard-00012.json",
    ]
    said = json.loads((tmp_path / "shard-00012.json").read_text())
    assert said.pop("seal") == sha256_of_json(said)
    assert said == {
        "file": "shard-00012.arrow",
        "fingerprint": "print",
        "rows": 2,
        "tokens": 10,
        "positions": 5,
        "entries": sum(counts),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rejects": [{"source": "chats.jsonl", "line": 7, "reason": "empty"}],
        "outline": {
            "batches": "0 1",
            "tokens": "6 4",
            "positions": "3 2",
            "id_hashes": "".join(hashlib.sha256(each).hexdigest()[:16] for each in (b"a", b"b")),
        },
        "sums": {"nll": 1.5},
    }
    assert committed_shard(tmp_path, 12, "print") == entry


def test_the_same_content_makes_the_same_bytes(tmp_path: Path, content: ShardContent) -> None:
    for index in (0, 1):
        commit_shard(tmp_path, index, SCHEMA, "print", content)

    assert (tmp_path / "shard-00000.arrow").read_bytes() == (
        tmp_path / "shard-00001.arrow"
    ).read_bytes()


@pytest.mark.parametrize("error", [RuntimeError("engine died"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_of_a_shard_leaves_nothing(
    tmp_path: Path, content: ShardContent, error: BaseException
) -> None:
    content.batches = Breaking(content.batches, error)

    with pytest.raises(type(error)):
        commit_shard(tmp_path, 0, SCHEMA, "print", content)

    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_middle_of_a_shard_keeps_the_one_that_was_there(
    tmp_path: Path, content: ShardContent, folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    commit_shard(tmp_path, 0, SCHEMA, "print", content)
    before = folder_bytes(tmp_path)
    content.batches = Breaking(content.batches, RuntimeError("engine died"))

    with pytest.raises(RuntimeError, match="engine died"):
        commit_shard(tmp_path, 0, SCHEMA, "print", content)

    assert folder_bytes(tmp_path) == before


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a full disk: a write beyond this many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, content: ShardContent
) -> None:
    with (
        files_no_larger_than(1000),
        pytest.raises(UserError, match=r"shard-00000\.arrow: cannot be written: File too large"),
    ):
        commit_shard(tmp_path, 0, SCHEMA, "print", content)

    assert list(tmp_path.iterdir()) == []


def test_a_file_takes_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()

    assert path.read_bytes() == b"half"


def test_a_file_in_a_folder_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a\.bin: cannot be written: No such file or directory"),
        atomic_file(tmp_path / "gone" / "a.bin"),
    ):
        pass


def test_a_sidecar_without_its_file_does_not_count(tmp_path: Path, content: ShardContent) -> None:
    commit_shard(tmp_path, 0, SCHEMA, "print", content)
    (tmp_path / "shard-00000.arrow").unlink()

    assert committed_shard(tmp_path, 0, "print") is None


def test_a_sidecar_of_a_truncated_file_does_not_count(
    tmp_path: Path, content: ShardContent
) -> None:
    entry = commit_shard(tmp_path, 0, SCHEMA, "print", content)
    path = tmp_path / "shard-00000.arrow"
    path.write_bytes(path.read_bytes()[: entry.bytes - 1])

    assert committed_shard(tmp_path, 0, "print") is None


def test_a_file_without_a_sidecar_does_not_count(tmp_path: Path, content: ShardContent) -> None:
    commit_shard(tmp_path, 0, SCHEMA, "print", content)
    (tmp_path / "shard-00000.json").unlink()

    assert committed_shard(tmp_path, 0, "print") is None


def test_a_sidecar_of_another_fingerprint_does_not_count(
    tmp_path: Path, content: ShardContent
) -> None:
    commit_shard(tmp_path, 0, SCHEMA, "print", content)

    assert committed_shard(tmp_path, 0, "other") is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b"3", b"null", b'{"file": "shard-00000.arrow"}', b"\xff\xfe",
     b'{"rows": NaN}', b'{"rows": 1e999}', b'{"file": "\xed\xa0\x80"}'],
)  # fmt: skip
def test_a_damaged_sidecar_is_refused_by_name(
    tmp_path: Path, content: ShardContent, data: bytes
) -> None:
    commit_shard(tmp_path, 0, SCHEMA, "print", content)
    (tmp_path / "shard-00000.json").write_bytes(data)

    with pytest.raises(UserError, match=r"shard-00000\.json: damaged"):
        committed_shard(tmp_path, 0, "print")


@pytest.mark.parametrize(
    "change",
    [{"rows": 3}, {"sums": {}}, {"rejects": []}, {"bytes": None}, {"rows": "2"}, {"seal": None}],
    ids=str,
)
def test_a_sidecar_that_says_something_else_is_refused_by_name(
    tmp_path: Path, content: ShardContent, change: dict[str, Any]
) -> None:
    """Or a run that goes on would seal what it says."""
    commit_shard(tmp_path, 0, SCHEMA, "print", content)
    path = sidecar_path(tmp_path, 0)
    write_json(path, json.loads(path.read_text()) | change)

    with pytest.raises(UserError, match=r"shard-00000\.json: damaged"):
        committed_shard(tmp_path, 0, "print")


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])]
)
def test_examples_are_cut_into_batches_of_64_rows(
    make_record: MakeRecord, count: int, sizes: list[int]
) -> None:
    records = [make_record(SCHEMA, np.random.default_rng(0), "a", 2, 1, 99)] * count

    assert BATCH_ROWS == 64
    assert [len(batch.ids) for batch in batches_of(SCHEMA, records)] == sizes


def test_a_shard_of_rejects_alone_is_read_as_no_batches(tmp_path: Path, toy: Any) -> None:
    class AllRejected(toy):
        def records(self, index: int) -> list[Any]:
            return []

    stage = AllRejected(tmp_path / "scores")
    stage.run()

    folder = open_sealed(stage.folder)
    assert [list(folder.batches(shard)) for shard in folder.shards] == [[], [], []]
    assert list(read_scores(stage.folder)) == []


def test_sums_add_up_whatever_the_number_of_calls() -> None:
    content = ShardContent()
    content.add_sums(nll=1.5, rows=1)
    content.add_sums(nll=np.float32(0.25))

    assert content.sums == {"nll": 1.75, "rows": 1.0}
    assert {type(value) for value in content.sums.values()} == {float}


def test_reading_gives_every_record_in_the_order_it_was_made(undisturbed: Path, toy: Any) -> None:
    stage = toy(undisturbed)
    made = [record for index in range(3) for record in stage.records(index)]

    read = list(read_scores(undisturbed))

    assert [record.id for record in read] == ["0-0", "0-1", "1-0", "2-0", "2-1"]
    for returned, record in zip(read, made, strict=True):
        for column in stage.schema.lists:
            values = getattr(returned, column.name)
            assert values.dtype == column.dtype
            np.testing.assert_array_equal(values, getattr(record, column.name))


def test_a_folder_given_as_text_is_read_too(undisturbed: Path) -> None:
    assert len(list(read_scores(str(undisturbed)))) == 5


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_byte_is_refused_with_the_file_named(sealed: Path, place: int) -> None:
    flip_byte(sealed / "shard-00001.arrow", place)
    read = []

    with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged, its hash is not"):
        read.extend(record.id for record in read_scores(sealed))

    assert read == ["0-0", "0-1"]


READ_WITH_BYTES_FLIPPED = """
import sys
from pathlib import Path
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed

folder = open_sealed(Path(sys.argv[1]))
path = folder.shard_path(0)
whole = path.read_bytes()
refused = 0
for place in range(0, len(whole), 5):
    damaged = bytearray(whole)
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    try:
        list(folder.batches(0, verify=False))
    except UserError as error:
        assert path.name in str(error), error
        refused += 1
print(refused)
"""


def test_a_flipped_byte_is_no_crash_where_the_hash_is_not_compared(sealed: Path) -> None:
    command = [sys.executable, "-c", READ_WITH_BYTES_FLIPPED, str(sealed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_truncated_shard_is_a_clear_error_also_when_the_hash_is_not_compared(
    sealed: Path,
) -> None:
    folder = open_sealed(sealed)
    path = sealed / "shard-00000.arrow"
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(UserError, match=r"shard-00000\.arrow: damaged"):
        list(folder.batches(0, verify=False))


def test_a_missing_shard_is_refused_with_the_file_named(sealed: Path) -> None:
    (sealed / "shard-00002.arrow").unlink()

    with pytest.raises(UserError, match=r"shard-00002\.arrow: missing"):
        list(read_scores(sealed))


def test_a_shard_of_another_stage_under_the_same_name_is_refused(
    sealed: Path, make_record: MakeRecord
) -> None:
    other = schema_of("build-targets", 100)
    record = make_record(other, np.random.default_rng(0), "a", 3, 2, 99)
    commit_shard(sealed, 0, other, "print", ShardContent(batches_of(other, [record])))
    folder = open_sealed(sealed)

    with pytest.raises(UserError, match=r"shard-00000\.arrow: its columns"):
        list(folder.batches(0, verify=False))


def test_scores_are_not_read_as_targets(sealed: Path) -> None:
    with pytest.raises(UserError, match="made by `qpipe score`, but the output of `qpipe build-"):
        list(read_targets(sealed))


def test_only_one_shard_is_in_memory_at_a_time(sealed: Path) -> None:
    records = read_scores(sealed)
    next(records)
    (sealed / "shard-00001.arrow").unlink()

    assert next(records).id == "0-1"
    with pytest.raises(UserError, match="shard-00001"):
        next(records)


def test_read_records_outlive_the_reader(sealed: Path) -> None:
    records = list(read_scores(sealed))
    for path in sealed.glob("shard-*.arrow"):
        path.write_bytes(b"\0" * path.stat().st_size)

    assert records[0].input_ids[-1] == 99
    assert all(np.isfinite(record.topk_log_probs).all() for record in records)


def test_json_is_written_the_same_for_the_same_value(sealed: Path) -> None:
    text = (sealed / "manifest.json").read_bytes()
    value = read_json(sealed / "manifest.json")

    assert json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n" == text


def test_shards_are_compressed(tmp_path: Path, make_record: MakeRecord) -> None:
    record = make_record(SCHEMA, np.random.default_rng(0), "a", 10_001, 10_000, 99)
    record.tail_mass[:] = 0
    flat = batches_of(SCHEMA, [record])

    entry = commit_shard(tmp_path, 0, SCHEMA, "print", ShardContent(flat))

    plain = pa.RecordBatch.from_pydict({"a": record.topk_log_probs}).nbytes
    raw = plain * 6 // 4 + 10_000 * (4 + 4 + 4 + 4 + 4 + 2)  # bytes of the columns as they are
    assert entry.bytes < 0.8 * raw
