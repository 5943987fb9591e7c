"""Runs a stage in this process, or as one of several tasks that share the shards of a folder.

`stages/execution/ray.py` runs a stage on Ray; pipeline does not know Ray.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ..errors import require
from ..storage.locks import lock_of, locked
from ..threads import in_order
from .manifest import MANIFEST, Plan, ShardEntry, read_manifest
from .shard_run import Job, ShardRun, StageResult, open_folder, sidecar_indices, tidy
from .shards import ShardContent
from .watch import Report, Watch, Watcher


class Stage(Protocol):
    """The work of a stage. Its pickle holds plain settings, so that any machine can run it."""

    @property
    def job(self) -> Job:
        """What is made, and where."""
        ...

    @property
    def shard_count(self) -> int | None:
        """The number of shards; None if it is unknown until all input is read."""
        ...

    @property
    def demonstrations(self) -> int | None:
        """The number of demonstrations, rejected ones included; None if unknown."""
        ...

    @property
    def gpus(self) -> int:
        """The number of GPUs that one worker takes on a machine that has GPUs."""
        ...

    def start(self) -> None:
        """Start what `make` needs, above all an engine."""
        ...

    def read(self, index: int) -> Any | None:
        """Read the input of shard `index`; None after the last. Fastest in ascending order.

        Called one at a time, on another thread than `make`.
        """
        ...

    def make(self, read: Any, report: Report, /) -> ShardContent:
        """Make a shard from its input. Called one at a time."""
        ...

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Raise UserError if the shards, which are complete, should not be sealed."""
        ...


@dataclass(frozen=True, slots=True)
class TaskShare:
    """The shards of one of several tasks: `rank`, `rank + world_size`, and so on.

    Which rows a shard covers does not depend on the number of tasks; it may change between runs.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "--world-size", self.world_size, "1 or more")
        require(
            0 <= self.rank < self.world_size,
            "--rank",
            self.rank,
            f"0 to {self.world_size - 1}, below --world-size {self.world_size}",
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    def __contains__(self, index: int) -> bool:
        return index % self.world_size == self.rank

    def indices(self, shard_count: int | None) -> Iterable[int]:
        """The shards of this task, ascending; endless if their number is unknown."""
        if shard_count is None:
            return count(self.rank, self.world_size)
        return range(self.rank, shard_count, self.world_size)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The work of one task on a folder that other tasks have not finished yet."""

    folder: Path
    share: TaskShare
    made: int  # shards, by this run
    there: int  # shards, by any task
    shards: int  # in the finished folder
    positions: int  # supervised positions of the shards made
    seconds: float  # spent on them


def run_alone(stage: Stage, watcher: Watcher) -> StageResult:
    """Make the missing shards of a folder in this process, and seal it."""
    return run_locked(stage, lambda run: _make_missing(stage, TaskShare(0, 1), run, watcher, True))


def run_locked(stage: Stage, make_missing: Callable[[ShardRun], None]) -> StageResult:
    """Lock a folder, call `make_missing`, and seal the folder."""
    with locked(stage.job.folder):
        done = open_folder(stage.job.folder, plan_of(stage))
        if done is not None:
            return done
        run = ShardRun(stage.job)
        make_missing(run)
        stage.check(list(run.committed.values()))
        return run.seal()


def run_task(stage: Stage, share: TaskShare, watcher: Watcher) -> StageResult | TaskResult:
    """Make the missing shards of one task; a task that finds all shards there seals the folder."""
    folder = stage.job.folder
    with lock_of(folder) as lock:
        alone = lock.alone()
        if not alone:
            lock.share(str(share))
        done = open_folder(folder, plan_of(stage), alone)
        if done is not None:
            return done
        lock.share(str(share))  # the task that has opened the folder lets the others in
        run = ShardRun(stage.job, share)
        _make_missing(stage, share, run, watcher, False)
        shards = stage.shard_count
        assert shards is not None, "a task reads to the end"
        there = len(sidecar_indices(folder))
        if there < shards or not run.find_all(shards):
            return TaskResult(folder, share, run.made, there, shards, run.positions, run.seconds)
        if (folder / MANIFEST).exists():
            if lock.alone():  # the task that sealed it was not
                tidy(folder)
            return StageResult(read_manifest(folder), run.positions, run.seconds)
        stage.check(list(run.committed.values()))
        return run.seal(lock.alone())


def plan_of(stage: Stage) -> Plan:
    """The plan of a stage's folder."""
    return Plan(stage.job.identity, stage.shard_count, stage.demonstrations)


def _make_missing(
    stage: Stage, share: TaskShare, run: ShardRun, watcher: Watcher, alone: bool
) -> None:
    """Make shards one by one; meanwhile the next one is read and the last one written."""
    shards, demonstrations = stage.shard_count, stage.demonstrations
    indices = share.indices(shards)
    if shards is None or any(index not in run.committed for index in indices):
        stage.start()  # before the bar, which the engine's own progress would tear apart
    if shards and demonstrations:
        demonstrations = demonstrations * len(list(indices)) // shards
    missing = (index for index in indices if index not in run.committed)
    with Watch(watcher, run.committed.values(), demonstrations, shards) as watch:

        def make(read: Any | None) -> ShardContent | None:
            return None if read is None else stage.make(read, watch.report)

        ahead = in_order(lambda index: (index, stage.read(index)), missing, workers=1)
        tasks = ((index, partial(make, read)) for index, read in ahead)
        run.make(tasks, watch.committed, alone=alone)
