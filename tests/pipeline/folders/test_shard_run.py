"""How a stage runs over its shards: resumed, and sealed."""

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
from msgspec.structs import replace
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import ShardEntry, read_manifest
from qpipe.pipeline.folders.shard_run import open_folder, totals_of
from qpipe.pipeline.folders.shards import read_sidecar, write_sidecar
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.files import sha256_of_file

from .stopped import FILES, FolderBytes, stop_at


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
    for stop in range(
        20
    ):  # 10 files: plan, 3 shards and sidecars, index, rejects, manifest; 2 syncs each
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
    assert made == [3, 3, 2, 2, 2, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


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
    for hang_at in (0, 2, 6, 12):  # plan; shard 0; shard 0 made again, the sidecar of 1; manifest
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


def test_a_sealed_folder_is_the_same_after_a_move(
    toy: Any, undisturbed: Path, tmp_path: Path
) -> None:
    moved = Path(copytree(undisturbed, tmp_path / "elsewhere"))
    stage = toy(moved)
    stage.run()

    assert stage.calls == []
    assert len(list(read_scores(moved))) == 5


def test_a_folder_with_a_shard_of_an_older_version_is_sealed_without_an_index(
    toy: Any, folder: Path, undisturbed: Path
) -> None:
    assert read_manifest(undisturbed).index == sha256_of_file(undisturbed / "index.arrow")
    stop_at(toy, folder, 2)
    entry, outline = read_sidecar(folder, 0)
    assert outline is not None
    write_sidecar(folder, 0, entry)  # as older versions write it
    manifest = toy(folder).run().manifest

    assert manifest == replace(read_manifest(undisturbed), index="")
    assert not (folder / "index.arrow").exists()
