"""A stage on Ray: workers with an engine each, which take shard after shard as they get done.

A worker commits its shards itself, so the output folder must be one that all machines share. The
shard of a worker that dies is made by another one.
"""

import os
import pickle
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from importlib.util import find_spec
from itertools import count
from math import inf
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import PLAN, ShardEntry
from ...pipeline.folders.shard_run import ShardRun, StageResult, open_folder
from ...pipeline.folders.shards import commit_shard
from ...pipeline.folders.tasks import Stage, plan_of
from ...pipeline.folders.watch import Watch, Watcher
from ...pipeline.signals import ends_in_order
from ...pipeline.storage.locks import locked
from ..quiet import quiet_libraries

_TRIES = 3  # workers that a shard may end, or that may die one after the other as they start
_AT_A_TIME = 2  # shards that a worker has
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 100 * 2**20  # for objects in transit, of which there are only small ones


def run_on_ray(
    stage: Stage, workers: int | None, address: str | None, watcher: Watcher
) -> StageResult:
    """Make what is missing of a folder on Ray workers, and seal it.

    Raises UserError where Ray is not installed or not to be reached, where it has no room for the
    workers, where one shard has ended three of them, and where none is left that could start.
    """
    if find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed: pip install 'qpipe[ray]'")
    folder = stage.job.folder
    with locked(folder):
        done = open_folder(folder, plan_of(stage))
        if done is not None:
            return StageResult(done, was_done=True)
        run = ShardRun(stage.job)
        shards = stage.shard_count
        if shards is None or len(run.committed) < shards:
            with connected(address) as ray:
                room = _room(ray, stage, workers)
                with watcher.watch(run.committed.values(), stage.demonstrations, shards) as watch:
                    _HandOut(ray, stage, run, room, watch).make_missing(shards)
        stage.check(list(run.committed.values()))
        return run.seal()


class _Worker:
    """Makes shards in a process of its own, as a Ray actor.

    Two at a time: while one is made, the other is read or written.
    """

    def __init__(self, stage: bytes, folder: str) -> None:
        quiet_libraries()
        self.pickled = stage
        self.folder = folder
        self.reading, self.making = Lock(), Lock()

    def start(self) -> None:
        """Rebuild the stage from its settings, and start what it needs."""
        machine = os.uname().nodename
        if not Path(self.folder).is_dir():
            raise UserError(
                f"{self.folder}: the folder that the command runs in is not there on {machine}: "
                "the machines of a cluster must share it"
            )
        os.chdir(self.folder)
        self.stage: Stage = pickle.loads(self.pickled)
        out = self.stage.job.folder
        if not (out / PLAN).exists():
            raise UserError(
                f"{out}: not there on {machine}: --out must be a folder that all machines of the "
                "cluster share"
            )
        self.stage.start()

    def make(self, index: int) -> tuple[ShardEntry, float] | None:
        """Make and commit a shard: its sidecar, and how many seconds it took; None behind the last.

        Threads of Ray's call it, `_AT_A_TIME` of them.
        """
        job = self.stage.job
        with self.reading:
            read = self.stage.read(index)
        if read is None:
            return None
        with self.making:
            start = perf_counter()
            content = self.stage.make(read, _unseen)
        entry = commit_shard(job.folder, index, job.schema, job.identity.fingerprint, content)
        return entry, perf_counter() - start


def _unseen(demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None:
    """The driver counts whole shards."""


@dataclass(frozen=True, slots=True)
class _Room:
    """How many workers there are, and what each takes."""

    workers: int
    cpus: int
    gpus: int


@dataclass(slots=True, eq=False)
class _Hired:
    """A worker, and how many shards it has: None while it starts."""

    actor: Any
    shards: int | None = None


class _HandOut:
    """Gives workers the lowest shards that nobody has, until none is left."""

    def __init__(self, ray: Any, stage: Stage, run: ShardRun, room: _Room, watch: Watch) -> None:
        self.ray = ray
        self.run = run
        self.watch = watch
        self.room = room
        self.arguments = (ray.put(pickle.dumps(stage)), str(Path.cwd()))
        self.actor = ray.remote(_Worker).options(
            num_cpus=room.cpus,
            num_gpus=room.gpus,
            max_concurrency=_AT_A_TIME,
            scheduling_strategy="SPREAD",
        )
        self.workers: list[_Hired] = []
        self.tasks: dict[Any, tuple[_Hired, int | None]] = {}  # and the shard, or None: it starts
        self.returned: list[int] = []  # shards of dead workers, a heap
        self.fresh: Iterator[int] = iter(())
        self.left = 0.0  # shards that nobody has, infinite where only reading tells
        self.deaths: Counter[int | None] = Counter()  # by shard; None: in starting, in a row
        self.last_words = Exception()  # of a worker that died

    def make_missing(self, shards: int | None) -> None:
        """Make what is missing of so many shards; of all up to the last, where None."""
        indices = count() if shards is None else range(shards)
        self.fresh = (index for index in indices if index not in self.run.committed)
        self.left = inf if shards is None else shards - len(self.run.committed)
        for _ in range(int(min(self.room.workers, self.left))):
            self._start_worker()
        began = None
        while not self._is_done():
            (task,), _ = self.ray.wait(list(self.tasks), num_returns=1)
            worker, index = self.tasks.pop(task)
            if self._took_result(task, index):
                if began is None:
                    began = perf_counter()
                    self.watch.begin()
                worker.shards = 0 if worker.shards is None else worker.shards - 1
            else:
                self._bury(worker, index)
            self._assign()
        self.run.seconds = perf_counter() - began if began else 0.0

    def _is_done(self) -> bool:
        """Whether a worker has found nothing to make, and no shard is under way."""
        under_way = any(index is not None for _, index in self.tasks.values())
        return not under_way and any(worker.shards == 0 for worker in self.workers)

    def _took_result(self, task: Any, index: int | None) -> bool:
        """Take note of what a worker has done; False if it has died."""
        try:
            result = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except self.ray.exceptions.RayError as error:  # dead, its machine gone, killed for memory
            self._note_death(index, error)
            return False
        if index is None:
            self.deaths[None] = 0
        elif result is None:
            self.left, self.fresh = len(self.returned), iter(())  # behind the last shard
        else:
            entry, seconds = result
            self.run.add(index, entry)
            self.watch.report_shard(entry)
            self.watch.committed(index, entry, seconds)
        return True

    def _note_death(self, index: int | None, error: Exception) -> None:
        self.deaths[index] += 1
        self.last_words = error
        if index is not None:
            if self.deaths[index] == _TRIES:
                raise _too_many_deaths(_TRIES, f"making shard {index}", error)
            self.left += 1
            heappush(self.returned, index)

    def _bury(self, worker: _Hired, index: int | None) -> None:
        """Start another worker in place of one that has died, which loses all its shards.

        Not where several have died as they start: the others then go on without, as a machine that
        ends all of its own ends no other's.
        """
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        if index is not None or self.deaths[None] < _TRIES:
            self._start_worker()
        elif self.workers:
            left = len(self.workers)
            print(f"Ray workers die while starting: {left} others go on", file=sys.stderr)
        else:
            raise _too_many_deaths(self.deaths[None], "starting", self.last_words)

    def _start_worker(self) -> None:
        worker = _Hired(self.actor.remote(*self.arguments))
        self.workers.append(worker)
        self.tasks[worker.actor.start.remote()] = worker, None

    def _assign(self) -> None:
        """Hand out shards, a second one only where enough are left for those that have none."""
        while ready := [each for each in self.workers if each.shards in range(_AT_A_TIME)]:
            worker = min(ready, key=lambda each: each.shards or 0)
            starting = sum(each.shards is None for each in self.workers)
            if self.left <= (starting if worker.shards else 0):
                return
            index = heappop(self.returned) if self.returned else next(self.fresh)
            self.left -= 1
            worker.shards = (worker.shards or 0) + 1
            self.tasks[worker.actor.make.remote(index)] = worker, index


def _too_many_deaths(deaths: int, what: str, error: Exception) -> UserError:
    return UserError(
        f"{deaths} Ray workers died while {what}, of memory as a rule: {one_line(error)}: finished "
        "shards are kept: run again with fewer --workers, a smaller --gpu-memory-utilization or "
        "--max-length"
    )


def _room(ray: Any, stage: Stage, workers: int | None) -> _Room:
    """How many workers there are to be. Raises UserError where Ray has no room for them."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [each for each in alive if each.get("CPU", 0) >= 1]  # a head may work for nobody
    wanted = [each for each in alive if each.get("GPU")] if stage.gpus else []
    if not machines or (wanted and not any(each in machines for each in wanted)):
        raise UserError(
            f"Ray has no machine with a CPU core{' and a GPU' if wanted else ''} for a worker: "
            "start one with `ray start --num-cpus 1` or more"
        )
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    if stage.gpus and any(gpus):
        room = sum(number // stage.gpus for number in gpus)
        if room < (workers or 1):
            raise UserError(
                f"Ray has GPUs for {room} workers of {stage.gpus}, machine by machine "
                f"{', '.join(map(str, gpus))}: give fewer --workers or a smaller "
                "--tensor-parallel-size"
            )
        return _Room(workers or room, cpus=1, gpus=stage.gpus)
    workers = workers or len(machines)
    if workers > sum(cpus):
        raise UserError(f"--workers {workers}: Ray has {sum(cpus)} CPU cores: give that or less")
    each = -(-workers // len(machines))  # on a machine
    return _Room(workers, cpus=max(1, min(cpus) // each), gpus=0)


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster or with one of its own, which ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would phone home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of it
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            # or what an engine has started would outlive its worker, with its GPU's memory
            "_system_config": {
                "kill_child_processes_on_worker_exit_with_raylet_subreaper": True,
                "worker_niceness": 0,  # the work is what this machine is for
            },
        }
    else:
        _check_address(address)
        options["address"] = address
    try:
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = "on this machine" if address is None else f"at --ray-address {address}"
            raise _unreachable(where, error) from error
        with ends_in_order():  # again: ray.init has put a handler of its own
            yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse HOST:PORT where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto", or Ray will say what is wrong
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(f"at --ray-address {address}", error) from error


def _unreachable(where: str, error: Exception) -> UserError:
    return UserError(
        f"Ray cannot be reached {where}: {one_line(error)}: start a cluster with `ray start "
        "--head`, or leave --ray-address out"
    )
