"""A stage in one process or shared by several tasks: the same bytes, whoever makes what."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders import shard_run as runner
from qpipe.pipeline.folders.manifest import ShardEntry, read_manifest, read_plan
from qpipe.pipeline.folders.shard_run import Job, ShardRun, StageResult
from qpipe.pipeline.folders.tasks import TaskResult, TaskShare, run_alone, run_task
from qpipe.pipeline.folders.watch import Speed, Watcher
from qpipe.pipeline.storage.locks import claimed, locked

FolderBytes = Callable[[Path], dict[str, bytes]]
WATCHER = Watcher("score", "0123")


class ToyStage:
    """The toy as a stage; `known` says whether its number of shards is known from the start."""

    gpus = 0

    def __init__(self, toy: Any, folder: Path, known: bool = True, **options: Any) -> None:
        self.toy = toy(folder, **options)
        self.shard_count = 3 if known else None
        self.started = 0

    @property
    def job(self) -> Job:
        return self.toy.job

    @property
    def demonstrations(self) -> int | None:
        return None if self.shard_count is None else 6

    def start(self) -> None:
        self.started += 1

    def read(self, index: int) -> int | None:
        if index >= 3:
            self.shard_count = 3
            return None
        return index

    def make(self, index: int, report: Any) -> Any:
        return self.toy.content(index)

    def check(self, shards: Sequence[ShardEntry]) -> None:
        assert len(shards) == 3


@pytest.mark.parametrize("known", [True, False])
def test_one_process_makes_all(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes, known: bool
) -> None:
    stage = ToyStage(toy, folder, known)
    result = run_alone(stage, WATCHER)

    assert (stage.toy.calls, stage.started) == ([0, 1, 2], 1)
    assert isinstance(result, StageResult)
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_shard_is_made_while_the_next_is_read_and_the_last_written(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    stage = ToyStage(toy, folder)
    was_read = [threading.Event() for _ in range(3)]
    read, make = stage.read, stage.make

    def note(index: int) -> int | None:
        if index < 3:
            was_read[index].set()
        return read(index)

    def wait(index: int, report: Any) -> Any:
        assert was_read[min(index + 1, 2)].wait(timeout=20)
        deadline = time.monotonic() + 20
        while index and not (folder / f"shard-0000{index - 1}.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return make(index, report)

    stage.read, stage.make = note, wait
    run_alone(stage, WATCHER)
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_shard_that_cannot_be_written_ends_the_run(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    commit = runner.commit_shard

    def full(folder: Path, index: int, *rest: Any) -> ShardEntry:
        if index == 1:
            raise UserError("no space left")
        return commit(folder, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "commit_shard", full)
        with pytest.raises(UserError, match="no space left"):
            run_alone(ToyStage(toy, folder), WATCHER)
    kept = sorted(path.name for path in folder.glob("shard-*.json"))
    assert kept == ["shard-00000.json", "shard-00002.json"]  # which was made meanwhile
    again = ToyStage(toy, folder)
    run_alone(again, WATCHER)
    assert again.toy.calls == [1]
    assert folder_bytes(folder) == folder_bytes(undisturbed)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("order", [1, -1])
def test_tasks_share_the_shards_and_the_last_seals(
    toy: Any,
    folder: Path,
    undisturbed: Path,
    folder_bytes: FolderBytes,
    known: bool,
    world_size: int,
    order: int,
) -> None:
    made = []
    for rank in list(range(world_size))[::order]:
        there = len(made)
        stage = ToyStage(toy, folder, known)
        result = run_task(stage, TaskShare(rank, world_size), WATCHER)
        assert stage.toy.calls == list(range(rank, 3, world_size))
        made += stage.toy.calls
        if isinstance(result, TaskResult):
            assert (result.made, result.there, result.shards) == (len(made) - there, len(made), 3)
        else:
            assert len(made) == 3

    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_the_number_of_tasks_may_change_and_a_plain_run_finishes_their_work(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    run_task(ToyStage(toy, folder), TaskShare(2, 5), WATCHER)
    second = ToyStage(toy, folder)
    run_task(second, TaskShare(0, 2), WATCHER)
    last = ToyStage(toy, folder)
    run_alone(last, WATCHER)

    assert (second.toy.calls, last.toy.calls) == ([0], [1])
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_the_last_task_hashes_no_shard_of_the_others(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Or one task would read the whole folder, while the others' GPUs are gone."""
    run_task(ToyStage(toy, folder), TaskShare(0, 2), WATCHER)
    hashed: list[str] = []
    monkeypatch.setattr(
        "qpipe.pipeline.folders.shards.sha256_of_file", lambda path: hashed.append(path)
    )
    result = run_task(ToyStage(toy, folder), TaskShare(1, 2), WATCHER)

    assert isinstance(result, StageResult)
    assert hashed == []
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_the_last_task_does_not_seal_over_a_shard_that_was_cut_off(toy: Any, folder: Path) -> None:
    run_task(ToyStage(toy, folder), TaskShare(0, 2), WATCHER)
    (folder / "shard-00002.arrow").write_bytes(b"ARROW1")
    result = run_task(ToyStage(toy, folder), TaskShare(1, 2), WATCHER)

    assert isinstance(result, TaskResult)
    assert not (folder / "manifest.json").exists()


def test_the_last_task_tidies_what_a_killed_one_left(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    run_task(ToyStage(toy, folder), TaskShare(0, 2), WATCHER)
    (folder / ".shard-00001.arrow.0a1b.tmp").write_bytes(b"half a shard")
    run_task(ToyStage(toy, folder), TaskShare(1, 2), WATCHER)

    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_task_without_shards_to_make_starts_no_engine(toy: Any, folder: Path) -> None:
    stage = ToyStage(toy, folder)
    result = run_task(stage, TaskShare(4, 5), WATCHER)

    assert isinstance(result, TaskResult)
    assert (stage.started, result.made, result.there) == (0, 0, 0)


def test_the_plan_says_how_much_there_will_be(toy: Any, folder: Path) -> None:
    run_task(ToyStage(toy, folder), TaskShare(0, 2), WATCHER)
    plan = read_plan(folder)
    assert (plan.shards, plan.demonstrations) == (3, 6)
    assert plan.identity == toy(folder).job.identity


@contextmanager
def another_process(code: str, folder: Path) -> Any:
    """Hold something of the folder in a process of its own while the block runs."""
    words = [sys.executable, "-c", code + "\nprint('held', flush=True); input()", str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.communicate(b"\n")


HOLD = "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(d, fcntl.{})"
CLAIM = (
    "import fcntl, os, sys; d = os.open(sys.argv[1] + '/.shard-00001.arrow.claim.tmp', "
    "os.O_RDWR | os.O_CREAT); fcntl.flock(d, fcntl.LOCK_EX)"
)


def test_a_plain_command_and_a_task_exclude_each_other(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.pipeline.storage.locks.PATIENCE", 0.1)
    folder.mkdir()
    with (
        another_process(HOLD.format("LOCK_SH"), folder),
        pytest.raises(UserError, match="another qpipe works in it"),
        locked(folder),
    ):
        pass
    stage = ToyStage(toy, folder)
    with (
        another_process(HOLD.format("LOCK_EX"), folder),
        pytest.raises(UserError, match="another qpipe works in it"),
    ):
        run_task(stage, TaskShare(0, 2), WATCHER)
    assert stage.toy.calls == []


def test_tasks_work_side_by_side_and_a_claimed_shard_is_left_to_its_maker(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    folder.mkdir()
    with another_process(HOLD.format("LOCK_SH"), folder), another_process(CLAIM, folder):
        stage = ToyStage(toy, folder)
        # as if every shard were this task's: one of another array size claims shard 1
        result = run_task(stage, TaskShare(0, 1), WATCHER)
    assert stage.toy.calls == [0, 2]
    assert isinstance(result, TaskResult)
    assert (result.there, result.shards) == (2, 3)
    run_alone(ToyStage(toy, folder), WATCHER)
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_tasks_of_other_settings_are_refused_even_before_there_is_a_shard(
    toy: Any, folder: Path
) -> None:
    folder.mkdir()
    with another_process(HOLD.format("LOCK_SH"), folder):
        run_task(ToyStage(toy, folder), TaskShare(4, 5), WATCHER)  # has none to make
        with pytest.raises(UserError, match="top_k is 5 there and 7 now"):
            run_task(ToyStage(toy, folder, settings={"top_k": 7}), TaskShare(0, 5), WATCHER)


def test_a_shard_committed_meanwhile_is_not_made_again(toy: Any, folder: Path) -> None:
    other = ToyStage(toy, folder)
    stage = ToyStage(toy, folder)
    stage.start = lambda: run_task(other, TaskShare(0, 1), WATCHER)  # between looking and making
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *_: None)  # as on a file system without locks
        run_task(stage, TaskShare(0, 1), WATCHER)
    assert (other.toy.calls, stage.toy.calls) == ([0, 1, 2], [])


def test_sealing_twice_at_a_time_gives_the_same_folder(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    """The second finds its temporary file gone: the first has tidied it away."""
    first, second = ToyStage(toy, folder), ToyStage(toy, folder)
    run_task(first, TaskShare(0, 2), WATCHER)
    run_task(ToyStage(toy, folder, fail_at=None), TaskShare(1, 2), WATCHER)
    wanted = read_manifest(folder)
    (folder / "manifest.json").unlink()
    run = ShardRun(second.job)
    replace = os.replace

    def seals_first(source: Path, target: Path) -> None:
        if Path(target).name == "rejects.jsonl":
            os.replace = replace
            ShardRun(first.job).seal(alone=True)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", seals_first)
        result = run.seal(alone=False)
    assert result.manifest == wanted
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_a_claim_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    with claimed(path) as ours, claimed(path) as others:
        assert (ours, others) == (True, False)
    assert list(tmp_path.iterdir()) == []
    with claimed(path) as ours:
        assert ours


def test_file_systems_without_locks_hold_nobody_off(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for rank in range(2):
        run_task(ToyStage(toy, folder), TaskShare(rank, 2), WATCHER)
    assert (folder / "manifest.json").exists()


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(UserError, match=r"--(rank|world-size) -?\d is out of range"):
        TaskShare(rank, world_size)


def test_the_speed_is_that_of_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    speed = Speed()
    for _ in range(100):
        now += 1
        slow = speed.add(10)
    for _ in range(40):
        now += 1
        fast = speed.add(30)
    assert slow == pytest.approx(10)
    assert fast == pytest.approx(30)


def test_a_task_that_comes_behind_the_seal_tidies(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes
) -> None:
    """Whoever sealed was not alone, and left what a killed task had left."""
    run_task(ToyStage(toy, folder), TaskShare(1, 2), WATCHER)
    (folder / ".shard-00001.arrow.0a1b.tmp").write_bytes(b"half a shard")
    find, job = ShardRun.find, ToyStage(toy, folder).job

    def find_and_seal(run: ShardRun, index: int, verify: bool = False) -> bool:
        is_there = len(list(folder.glob("shard-*.json"))) == 3
        if is_there and not (folder / "manifest.json").exists():
            ShardRun(job).seal(alone=False)  # as another task
        return find(run, index, verify)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardRun, "find", find_and_seal)
        assert isinstance(run_task(ToyStage(toy, folder), TaskShare(0, 2), WATCHER), StageResult)
    assert folder_bytes(folder) == folder_bytes(undisturbed)


@pytest.mark.parametrize("fault", ["removed", "cut"])
def test_no_folder_is_sealed_without_a_shard_that_is_gone(
    toy: Any, folder: Path, undisturbed: Path, folder_bytes: FolderBytes, fault: str
) -> None:
    stage = ToyStage(toy, folder)
    shard = folder / "shard-00000.arrow"

    def check(shards: Sequence[ShardEntry]) -> None:
        if fault == "removed":
            shard.unlink()
        else:
            os.truncate(shard, shard.stat().st_size - 1)

    stage.check = check
    with pytest.raises(UserError, match=r"shard-00000\.arrow: (missing|damaged), it was there"):
        run_alone(stage, WATCHER)
    assert not (folder / "manifest.json").exists()
    run_alone(ToyStage(toy, folder), WATCHER)
    assert folder_bytes(folder) == folder_bytes(undisturbed)


def test_an_error_lets_go_of_a_claim(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "shard-00000.arrow"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
