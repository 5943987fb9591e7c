"""How a stage runs over its shards: resumed, sealed, refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from msgspec.structs import asdict, replace
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Plan, ShardEntry, read_manifest, shard_name
from qpipe.pipeline.folders.shard_run import MOST_SHARDS, open_folder, totals_of
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.files import MOST_BYTES
from qpipe.pipeline.storage.json_files import json_bytes
from qpipe.pipeline.storage.locks import locked

FolderBytes = Callable[[Path], dict[str, bytes]]
FILES = [
    "manifest.json",
    "rejects.jsonl",
    "shard-00000.arrow",
    "shard-00000.json",
    "shard-00001.arrow",
    "shard-00001.json",
    "shard-00002.arrow",
    "shard-00002.json",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "scores"


def stop_at(toy: Any, folder: Path, shard: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(folder, fail_at=shard).run()


def test_a_run_seals_its_folder_with_nothing_else_in_it(toy: Any, folder: Path) -> None:
    stage = toy(folder)
    result = stage.run()

    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert stage.calls == [0, 1, 2]
    assert result.manifest == read_manifest(folder)
    assert result.positions == 3 + 4 + 3 + 3 + 4
    assert result.seconds > 0


def test_a_folder_in_folders_that_are_not_there_yet_is_made(toy: Any, tmp_path: Path) -> None:
    toy(tmp_path / "a" / "b" / "scores").run()

    assert (tmp_path / "a" / "b" / "scores" / "manifest.json").exists()


def test_two_runs_give_the_same_bytes(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    toy(folder).run()

    assert folder_bytes(folder) == folder_bytes(undisturbed)


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_a_relaunch_makes_only_the_missing_shards_and_the_same_bytes(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes, stopped_at: int
) -> None:
    stop_at(toy, folder, stopped_at)
    again = toy(folder)
    result = again.run()

    assert again.calls == list(range(stopped_at, 3))
    assert result.positions == sum([7, 3, 7][stopped_at:])
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_stopped_run_leaves_its_plan_and_whole_shards_alone(toy: Any, folder: Path) -> None:
    stop_at(toy, folder, 1)

    assert sorted(path.name for path in folder.iterdir()) == [
        "plan.json",
        "shard-00000.arrow",
        "shard-00000.json",
    ]


def test_a_run_stopped_before_sealing_is_continued_by_sealing(
    toy: Any,
    folder: Path,
    undisturbed: Path,
    folder_bytes: FolderBytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qpipe.pipeline.folders.shard_run.ShardRun.seal", stopped)
        with pytest.raises(KeyboardInterrupt):
            toy(folder).run()
    with pytest.raises(UserError, match="not finished yet: run `qpipe score`"):
        read_manifest(folder)
    again = toy(folder)
    again.run()

    assert again.calls == []
    assert folder_bytes(folder) == folder_bytes(undisturbed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "shard-00001.arrow").unlink(),
        lambda folder: (folder / "shard-00001.arrow").write_bytes(b"ARROW1"),
        lambda folder: (folder / "shard-00001.json").unlink(),
    ],
    ids=["arrow file missing", "arrow file truncated", "sidecar missing"],
)
def test_a_shard_that_is_not_whole_is_made_again(
    toy: Any,
    folder: Path,
    undisturbed: Path,
    folder_bytes: FolderBytes,
    damage: Callable[[Path], None],
) -> None:
    stop_at(toy, folder, 2)
    damage(folder)
    again = toy(folder)
    again.run()

    assert again.calls == [1, 2]
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_sealed_folder_of_the_same_identity_is_left_as_it_is(
    toy: Any, folder: Path, folder_bytes: FolderBytes
) -> None:
    first = toy(folder).run()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = toy(folder)
    result = again.run()

    assert again.calls == []
    assert result.manifest == first.manifest
    assert (result.positions, result.seconds) == (0, 0.0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_sealed_folder_that_lost_a_shard_is_not_called_done(
    toy: Any, folder: Path, what: str
) -> None:
    toy(folder).run()
    shard = folder / "shard-00001.arrow"
    shard.unlink() if what == "missing" else shard.write_bytes(b"ARROW1")

    with pytest.raises(UserError, match=f"shard-00001.arrow: {what}"):
        toy(folder).run()


def test_a_folder_killed_between_its_manifest_and_the_end_is_tidied_by_the_next_run(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    stop_at(toy, folder, 0)
    plan = (folder / "plan.json").read_bytes()
    toy(folder).run()
    (folder / "plan.json").write_bytes(plan)
    toy(folder).run()

    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_leftovers_beside_a_manifest_are_tidied_by_the_next_run(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    toy(folder).run()
    (folder / ".shard-00000.arrow.7.tmp").write_bytes(b"half a shard")
    toy(folder).run()

    assert folder_bytes(folder) == folder_bytes(undisturbed)


@pytest.mark.parametrize("sealed", [True, False])
def test_another_setting_is_refused_with_the_field_and_both_values(
    toy: Any, folder: Path, folder_bytes: FolderBytes, sealed: bool
) -> None:
    if sealed:
        toy(folder).run()
    else:
        stop_at(toy, folder, 2)
    before = folder_bytes(folder)
    other = toy(folder, settings={"top_k": 7})

    with pytest.raises(UserError) as refused:
        other.run()

    assert str(folder) in str(refused.value)
    assert "settings.top_k is 5 there and 7 now" in str(refused.value)
    assert other.calls == []
    assert folder_bytes(folder) == before


def test_a_folder_of_another_stage_is_refused(toy: Any, undisturbed: Path) -> None:
    identity = replace(toy(undisturbed).job.identity, stage="build-targets")

    with pytest.raises(UserError, match="already holds `qpipe score` output made differently"):
        open_folder(undisturbed, identity)


@pytest.mark.parametrize(
    "name", ["notes.txt", "chats.jsonl", ".hidden", "shard-00000.arrow", "rejects.jsonl", "sub"]
)
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    toy: Any, folder: Path, name: str
) -> None:
    folder.mkdir()
    if name == "sub":
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    stage = toy(folder)

    with pytest.raises(UserError, match=f"holds something else \\({name}\\)"):
        stage.run()

    assert [path.name for path in folder.iterdir()] == [name]
    assert name == "sub" or (folder / name).read_text() == "mine"
    assert stage.calls == []


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_alone(
    toy: Any, folder: Path
) -> None:
    folder.write_text("mine")

    with pytest.raises(UserError, match="cannot be used for output: File exists"):
        toy(folder).run()

    assert folder.read_text() == "mine"


def test_a_folder_inside_a_file_is_refused(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="scores: cannot be used for output: Not a directory"):
        toy(tmp_path / "file" / "scores").run()


def test_an_empty_folder_is_used(toy: Any, folder: Path) -> None:
    folder.mkdir()
    toy(folder).run()

    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"plan"', '{"stage": "score"}'])
def test_a_damaged_plan_is_refused_by_name(toy: Any, folder: Path, text: str) -> None:
    stop_at(toy, folder, 1)
    (folder / "plan.json").write_text(text)

    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        toy(folder).run()
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": []},
        {"counts": {"shards": "3"}},
        {"counts": {"demonstrations": -1}},
        {"counts": {"more": 1}},
        {"stage": ["score"]},
        {"settings": []},
        {"inputs": None},
        {"settings": {"a": "\ud800"}},
    ],
    ids=str,
)
def test_a_plan_of_another_shape_is_refused_by_name(
    toy: Any, folder: Path, change: dict[str, Any]
) -> None:
    stop_at(toy, folder, 1)
    plan = folder / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))

    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        toy(folder).run()
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_sidecar_stops_the_run_by_name(toy: Any, folder: Path, text: str) -> None:
    stop_at(toy, folder, 1)
    (folder / "shard-00000.json").write_text(text)

    with pytest.raises(UserError, match=r"shard-00000\.json: damaged"):
        toy(folder).run()


def test_a_copy_of_a_sidecar_is_no_crash(toy: Any, folder: Path) -> None:
    stop_at(toy, folder, 1)
    (folder / "shard-00000 (copy).json").write_bytes((folder / "shard-00000.json").read_bytes())
    try:
        toy(folder).run()
    except UserError as error:
        assert "(copy)" in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_manifest_stops_the_run_and_is_left_alone(
    toy: Any, folder: Path, text: str
) -> None:
    toy(folder).run()
    (folder / "manifest.json").write_text(text)

    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        toy(folder).run()

    assert (folder / "manifest.json").read_text() == text


def test_totals_add_up_to_what_the_shards_hold(toy: Any, folder: Path) -> None:
    manifest = toy(folder).run().manifest
    records = list(read_scores(folder))
    sizes = [(folder / entry.file).stat().st_size for entry in manifest.shards]

    assert manifest.totals == {
        "read": 6,
        "rows": 5,
        "rejected": 1,
        "tokens": 8 + 9 + 8 + 8 + 9,
        "positions": 3 + 4 + 3 + 3 + 4,
        "entries": sum(len(record.topk_ids) for record in records),
        "bytes": sum(sizes),
        "sums": {"nll": 0.5 + 1.5 + 2.5},
    }
    assert manifest.totals["read"] == manifest.totals["rows"] + manifest.totals["rejected"]
    assert len(records) == manifest.totals["rows"]


def test_a_sum_that_some_shards_lack_counts_as_zero_there() -> None:
    def entry(**sums: float) -> ShardEntry:
        return ShardEntry("f", "p", 1, 2, 1, 1, 10, "h", sums=sums)

    assert totals_of([entry(nll=1.0), entry(cut=2.0), entry()])["sums"] == {"cut": 2.0, "nll": 1.0}


def test_totals_of_no_shards_are_zero() -> None:
    assert totals_of([]) == {
        "rows": 0,
        "tokens": 0,
        "positions": 0,
        "entries": 0,
        "bytes": 0,
        "rejected": 0,
        "read": 0,
        "sums": {},
    }


def test_rejects_are_json_lines_in_the_order_of_the_demonstrations(toy: Any, folder: Path) -> None:
    class Rejecting(toy):
        def content(self, index: int) -> Any:
            content = super().content(index)
            content.rejects = [Reject(f"{index}.jsonl", line, "“ü”\nno") for line in (9, 3)]
            return content

    with pytest.raises(KeyboardInterrupt):
        Rejecting(folder, fail_at=2).run()
    Rejecting(folder).run()

    lines = (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": f"{index}.jsonl", "line": line, "reason": "“ü”\nno"}
        for index in range(3)
        for line in (9, 3)
    ]
    assert "“ü”" in lines[0]  # readable as it is


def test_no_rejects_make_an_empty_file(toy: Any, folder: Path) -> None:
    toy(folder, shard_count=1).run()

    assert (folder / "rejects.jsonl").read_bytes() == b""


def test_a_stop_at_any_sync_is_continued_to_the_same_bytes(
    toy: Any,
    tmp_path: Path,
    undisturbed: Path,
    folder_bytes: FolderBytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = folder_bytes(undisturbed)
    made = []
    for stop in range(18):  # 9 files: plan, 3 shards, 3 sidecars, rejects, manifest; 2 syncs each
        folder = tmp_path / str(stop)
        calls = iter(range(100))

        def sync(_: int, calls: Any = calls, stop: int = stop) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            with pytest.raises(KeyboardInterrupt):
                toy(folder).run()
        assert not list(folder.glob(".*"))
        again = toy(folder)
        again.run()
        assert folder_bytes(folder) == wanted
        made.append(len(again.calls))

    # a sidecar has its name before its second sync, so a stop there finds the shard whole; the one
    # behind it has been made meanwhile, and is still written
    assert made == [3, 3, 2, 2, 2, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]


HANG_AT_A_SYNC = """
import os, runpy, sys, time
from pathlib import Path

conftest, folder, hang_at = sys.argv[1:]
Toy = runpy.run_path(conftest)["Toy"]
calls = iter(range(100))

def sync(_):
    if next(calls) == int(hang_at):
        print("in the middle", flush=True)
        time.sleep(60)

os.fsync = sync
Toy(Path(folder)).run()
"""


def kill_in_the_middle(folder: Path, hang_at: int) -> None:
    """Run the toy's stage in another process; SIGKILL it before its sync number `hang_at`."""
    conftest = Path(__file__).parents[1] / "conftest.py"
    command = [sys.executable, "-c", HANG_AT_A_SYNC, str(conftest), str(folder), str(hang_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_what_a_killed_run_leaves_does_not_hinder_the_next_and_is_gone_after_sealing(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    for hang_at in (0, 2, 6, 10):  # plan; shard 0; shard 0 made again, the sidecar of 1; manifest
        kill_in_the_middle(folder, hang_at)
    leftovers = sorted(path.name.rsplit(".", 2)[0] for path in folder.glob(".*.tmp"))
    again = toy(folder)
    again.run()

    assert leftovers == [".manifest.json", ".plan.json", ".shard-00000.arrow", ".shard-00001.json"]
    assert again.calls == []
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_plan_that_led_to_nothing_gives_way_to_another(toy: Any, folder: Path) -> None:
    open_folder(folder, replace(toy(folder).job.identity, settings={"top_k": 99}))
    toy(folder).run()

    assert read_manifest(folder).fingerprint == toy(folder).job.identity.fingerprint


def test_shards_of_a_plan_that_led_to_nothing_are_not_left_beside_those_of_another(
    toy: Any, folder: Path
) -> None:
    """They hold rejects alone, and may be more than the other plan has."""

    class Nothing(toy):
        def records(self, index: int) -> list[Any]:
            return []

    stop_at(partial(Nothing, settings={"top_k": 99}, shard_count=9), folder, shard=8)
    assert (folder / "shard-00007.arrow").exists()
    toy(folder).run()
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_more_rejects_than_a_manifest_can_hold_end_the_run(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rejecting(toy):
        def content(self, index: int) -> Any:
            content = super().content(index)
            content.rejects = [Reject("chats.jsonl", 1, "too long")] * 4
            return content

    of_four = len(json_bytes([asdict(Reject("chats.jsonl", 1, "too long"))] * 4))
    monkeypatch.setattr("qpipe.pipeline.folders.shard_run.MOST_OF_REJECTS", 2 * of_four - 1)
    with pytest.raises(UserError, match=f"cannot be used.* take {2 * of_four:,} bytes; .*is the m"):
        Rejecting(folder, shard_count=9).run()
    again = Rejecting(folder, shard_count=9)
    with pytest.raises(UserError, match="demonstrations cannot be used"):
        again.run()
    assert again.calls == []


def test_a_manifest_too_large_to_be_read_is_not_written(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.pipeline.storage.json_files.MOST_BYTES", 2000)
    with pytest.raises(UserError, match=r"manifest.json: would have [\d,]+ bytes, more than is"):
        toy(folder).run()
    assert not (folder / "manifest.json").exists()


def test_reasons_that_no_reader_would_take_are_refused_as_their_shard_is_written(
    toy: Any, folder: Path
) -> None:
    """Full of commas: they count as values where a file is read."""

    class Rejecting(toy):
        def content(self, index: int) -> Any:
            content = super().content(index)
            content.rejects = [Reject("chats.jsonl", 1, "," * 300)] * 1000
            return content

    with pytest.raises(UserError, match=r"shard-00000.json: would have 3\d\d,\d+ values in"):
        Rejecting(folder).run()
    assert [*folder.glob("shard-*.json")] == []


def test_more_shards_than_a_manifest_can_hold_are_refused_before_the_work(
    toy: Any, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"150,001 shards, 150,000 is the most.*--shard-size"):
        open_folder(folder, Plan(toy(folder).job.identity, shards=150_001))
    assert not folder.exists()


def test_a_manifest_of_the_most_shards_can_be_read() -> None:
    """A target folder's says the most of each shard: 28 sums."""
    sums = {f"ceiling.divergence.{number}": -1234567.123456789 for number in range(28)}
    entry = ShardEntry(shard_name(99_999), "0" * 64, *[10**9] * 5, "0" * 64, [], sums)
    assert MOST_SHARDS * len(json_bytes([asdict(entry)])) < MOST_BYTES


def test_a_folder_that_another_process_works_in_is_refused(folder: Path) -> None:
    with locked(folder):
        code = "import sys, pathlib; from qpipe.pipeline.storage.locks import locked\n"
        code += "with locked(pathlib.Path(sys.argv[1])): pass"
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
        )
        assert f"{folder}: another qpipe works in it" in done.stderr
    with locked(folder):
        pass


def test_a_sealed_folder_is_the_same_after_a_move(
    toy: Any, undisturbed: Path, tmp_path: Path
) -> None:
    moved = Path(copytree(undisturbed, tmp_path / "elsewhere"))
    stage = toy(moved)
    stage.run()

    assert stage.calls == []
    assert len(list(read_scores(moved))) == 5
