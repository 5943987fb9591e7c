"""Where a stage runs: in this process, or as one task of several that share the shards.

Both are short ways over the same thing: a `Stage`, which says what is to be made and makes any one
shard of it, in this process or, sent there as a pickle, in another. (On a Ray cluster:
`stages/execution/ray.py`, as this floor of the house does not know ray.)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError, require
from ..storage.locks import claimed, lock_of, locked
from ..threads import in_order
from .manifest import MANIFEST, Plan, ShardEntry, read_manifest
from .shard_run import Claim, Job, ShardRun, StageResult, open_folder, sidecar_indices, tidy
from .shards import ShardContent
from .watch import Report, Watcher


class Stage(Protocol):
    """The work of a stage. A pickle of it is made of plain settings, so it can be sent anywhere."""

    @property
    def job(self) -> Job:
        """What is made, and where."""
        ...

    @property
    def shard_count(self) -> int | None:
        """How many shards there are; None where only reading to the end tells."""
        ...

    @property
    def demonstrations(self) -> int | None:
        """How many demonstrations there are, those that get rejected included."""
        ...

    @property
    def gpus(self) -> int:
        """How many GPUs one worker takes, where there are any."""
        ...

    def start(self) -> None:
        """Start what the making needs, an engine above all."""
        ...

    def read(self, index: int) -> Any | None:
        """What shard `index` is made of; None behind the last. Quickest in ascending order.

        One call at a time, but beside `make`, on another thread.
        """
        ...

    def make(self, read: Any, report: Report, /) -> ShardContent:
        """Make a shard of what was read for it, one at a time."""
        ...

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Raises UserError where these shards, which are all, are not worth sealing."""
        ...


@dataclass(frozen=True, slots=True)
class TaskShare:
    """What one of several tasks makes: the shards `rank`, `rank` + `world_size`, and so on.

    The row plan is the same whatever the number of tasks, which may differ from run to run.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "--world-size", self.world_size, "1 or more")
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"--rank {self.rank} is out of range: ranks of --world-size {self.world_size} are "
                f"0 to {self.world_size - 1}"
            )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    def __contains__(self, index: int) -> bool:
        return index % self.world_size == self.rank

    def indices(self, shard_count: int | None) -> Iterable[int]:
        """The shards of this task, in their order; endless where their number is not known."""
        if shard_count is None:
            return count(self.rank, self.world_size)
        return range(self.rank, shard_count, self.world_size)


ALL = TaskShare(0, 1)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one of several tasks has done for a folder that others still work for."""

    folder: Path
    share: TaskShare
    made: int  # shards, by this run
    there: int  # shards, whoever made them
    shards: int  # that the folder will have
    positions: int  # supervised positions of those made
    seconds: float  # spent on them


def run_alone(stage: Stage, watcher: Watcher) -> StageResult:
    """Make the missing shards of a folder in this process, and seal it."""
    return run_locked(stage, lambda run: _make_missing(stage, ALL, run, watcher))


def run_locked(stage: Stage, make_missing: Callable[[ShardRun], None]) -> StageResult:
    """Lock a folder, have its missing shards made, and seal it."""
    folder = stage.job.folder
    with locked(folder):
        done = open_folder(folder, plan_of(stage))
        if done is not None:
            return StageResult(done, was_done=True)
        run = ShardRun(stage.job)
        make_missing(run)
        stage.check(list(run.committed.values()))
        return run.seal()


def run_task(stage: Stage, share: TaskShare, watcher: Watcher) -> StageResult | TaskResult:
    """Make what is missing of one task's share; a task that finds all there seals the folder."""
    folder = stage.job.folder
    with lock_of(folder) as lock:
        alone = lock.alone()
        if not alone:
            lock.share(str(share))
        done = open_folder(folder, plan_of(stage), alone)
        if done is not None:
            return StageResult(done, was_done=True)
        lock.share(str(share))  # the task that has opened the folder lets the others in
        run = ShardRun(stage.job, share)
        _make_missing(stage, share, run, watcher, claimed)
        shards = stage.shard_count
        assert shards is not None, "a task reads to the end"
        there = len(sidecar_indices(folder))
        if there < shards or not run.find_all(shards):
            return TaskResult(folder, share, run.made, there, shards, run.positions, run.seconds)
        if (folder / MANIFEST).exists():
            if lock.alone():  # whoever sealed it was not
                tidy(folder)
            return StageResult(read_manifest(folder), run.positions, run.seconds)
        stage.check(list(run.committed.values()))
        return run.seal(lock.alone())


def plan_of(stage: Stage) -> Plan:
    """The plan of a stage's folder."""
    return Plan(stage.job.identity, stage.shard_count, stage.demonstrations)


def _make_missing(
    stage: Stage, share: TaskShare, run: ShardRun, watcher: Watcher, claim: Claim | None = None
) -> None:
    """Make shards one after another, the next one being read and the last one written meanwhile."""
    shards, demonstrations = stage.shard_count, stage.demonstrations
    indices = share.indices(shards)
    if shards is None or any(index not in run.committed for index in indices):
        stage.start()  # before there is a bar, which its own progress would tear apart
    if shards and demonstrations:
        demonstrations = demonstrations * len(list(indices)) // shards
    missing = (index for index in indices if index not in run.committed)
    with watcher.watch(run.committed.values(), demonstrations, shards) as watch:

        def make(read: Any | None) -> ShardContent | None:
            return None if read is None else stage.make(read, watch.report)

        ahead = in_order(lambda index: (index, stage.read(index)), missing, workers=1)
        tasks = ((index, partial(make, read)) for index, read in ahead)
        for _ in run.shards(tasks, claim, watch.committed):
            pass
