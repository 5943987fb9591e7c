"""Runs a stage on Ray: actors with one engine each, to which shards are assigned one by one.

Workers commit their shards themselves, so all machines must share the output folder. If a worker
fails, its shards are assigned to the other workers, and another worker is started.

Ray's own `max_restarts` and `max_task_retries` are not used, because they cannot give this:

- `max_restarts` counts over an actor's life. With 2, the third failure of a worker in a run of
  weeks is final, even if each failure was in another shard; the next shard then fails with it.
- With -1, an actor whose start ends its process is started again without an end or an error.
- A retried task waits for its own actor to load its engine again, even if other workers are idle.
- The caller does not learn of failures that were retried, so it can neither count them for each
  shard nor continue without a machine on which workers cannot start.
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
from ...pipeline.folders.shard_run import ShardRun, StageResult
from ...pipeline.folders.shards import commit_shard
from ...pipeline.folders.tasks import Stage, run_locked
from ...pipeline.folders.watch import Watch, Watcher
from ...pipeline.signals import ends_in_order
from ..engines.choose import this_host
from ..engines.settings import Host
from ..quiet import quiet_libraries

_TRIES = 3  # failures allowed for one shard, and in a row for workers that start
_SHARDS_PER_WORKER = 2
_CONNECT_SECONDS = 10.0
_GPU_TO_ASK = 0.001  # of a GPU, so that others may use it
_STORE_BYTES = 100 * 2**20  # of the object store: only small objects are sent


def run_on_ray(
    stage: Stage, workers: int | None, address: str | None, watcher: Watcher
) -> StageResult:
    """Make the missing shards of a folder on Ray workers, and seal it.

    Raises UserError if Ray is not installed, cannot be reached, or lacks the resources for the
    workers, if workers fail three times with the same shard, and if all of them fail to start.
    """

    def make_missing(run: ShardRun) -> None:
        shards = stage.shard_count
        if shards is not None and len(run.committed) == shards:
            return
        with connected(address) as ray:
            room = _room(ray, stage, workers)
            with Watch(watcher, run.committed.values(), stage.demonstrations, shards) as watch:
                _Dispatcher(ray, stage, run, room, watch).make_missing(shards)

    return run_locked(stage, make_missing)


def host_of_cluster(address: str) -> Host:
    """What a machine of a cluster has: one with a GPU, if there is any.

    The command may run on a head node without a GPU and without vLLM.
    """
    with connected(address) as ray:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpu = any(each.get("GPU") for each in alive)
        ask = ray.remote(this_host).options(num_cpus=0, num_gpus=_GPU_TO_ASK if has_gpu else 0)
        return ray.get(ask.remote())


class _Worker:
    """A Ray actor that makes shards.

    It has two shards at a time: while one is made, the other is read or written.
    """

    def __init__(self, stage: bytes, folder: str) -> None:
        quiet_libraries()
        self.pickled = stage
        self.folder = folder
        self.reading, self.making = Lock(), Lock()

    def start(self) -> None:
        """Unpickle the stage, and start its engine."""
        machine = os.uname().nodename
        if not Path(self.folder).is_dir():
            raise UserError(
                f"{self.folder}: the working directory of the command does not exist on {machine}: "
                "run the command in a directory that all machines of the cluster share"
            )
        os.chdir(self.folder)
        self.stage: Stage = pickle.loads(self.pickled)
        out = self.stage.job.folder
        if not (out / PLAN).exists():
            raise UserError(
                f"{out}: does not exist on {machine}: give an --out that all machines of the "
                "cluster share"
            )
        self.stage.start()

    def make(self, index: int) -> tuple[ShardEntry, float] | None:
        """Make and commit a shard; returns its sidecar and the seconds its making took.

        Returns None if `index` is past the last shard. Ray calls this on `_SHARDS_PER_WORKER`
        threads.
        """
        job = self.stage.job
        with self.reading:
            read = self.stage.read(index)
        if read is None:
            return None
        with self.making:
            start = perf_counter()
            content = self.stage.make(read, _no_report)
        entry = commit_shard(job.folder, index, job.schema, job.identity.fingerprint, content)
        return entry, perf_counter() - start


def _no_report(demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None:
    """Progress within a shard is not reported: the driver counts whole shards."""


@dataclass(frozen=True, slots=True)
class _Room:
    """The number of workers, and the resources of each."""

    workers: int
    cpus: int
    gpus: int


@dataclass(slots=True, eq=False)
class _WorkerState:
    """A worker, and the number of shards assigned to it; None while it starts."""

    actor: Any
    shards: int | None = None


class _Dispatcher:
    """Assigns shards to workers, the lowest unassigned one first, until all are made."""

    def __init__(self, ray: Any, stage: Stage, run: ShardRun, room: _Room, watch: Watch) -> None:
        self.ray = ray
        self.run = run
        self.watch = watch
        self.room = room
        self.arguments = (ray.put(pickle.dumps(stage)), str(Path.cwd()))
        self.actor = ray.remote(_Worker).options(
            num_cpus=room.cpus,
            num_gpus=room.gpus,
            max_concurrency=_SHARDS_PER_WORKER,
            scheduling_strategy="SPREAD",
        )
        self.workers: list[_WorkerState] = []
        self.tasks: dict[Any, tuple[_WorkerState, int | None]] = {}  # the shard; None: start
        self.returned: list[int] = []  # shards of failed workers, a heap
        self.untried: Iterator[int] = iter(())
        self.unassigned = 0.0  # number of shards; infinite until the last shard is known
        self.failures: Counter[int | None] = Counter()  # by shard; None: of starts, in a row
        self.last_error = Exception()  # of a failed worker

    def make_missing(self, shards: int | None) -> None:
        """Make the missing ones of `shards` shards; None: of all until a worker finds the end."""
        indices = count() if shards is None else range(shards)
        self.untried = (index for index in indices if index not in self.run.committed)
        self.unassigned = inf if shards is None else shards - len(self.run.committed)
        for _ in range(int(min(self.room.workers, self.unassigned))):
            self._start_worker()
        began = None
        while not self._is_done():
            (task,), _ = self.ray.wait(list(self.tasks), num_returns=1)
            worker, index = self.tasks.pop(task)
            if self._take_result(task, index):
                if began is None:
                    began = perf_counter()
                    self.watch.begin()
                worker.shards = 0 if worker.shards is None else worker.shards - 1
            else:
                self._replace_worker(worker, index)
            self._assign()
        self.run.seconds = perf_counter() - began if began else 0.0

    def _is_done(self) -> bool:
        """Whether no shard is being made, and a worker is idle."""
        under_way = any(index is not None for _, index in self.tasks.values())
        return not under_way and any(worker.shards == 0 for worker in self.workers)

    def _take_result(self, task: Any, index: int | None) -> bool:
        """Record the result of a finished task; returns False if its worker has failed."""
        try:
            result = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except self.ray.exceptions.RayError as error:  # the process ended, or its machine
            self._note_failure(index, error)
            return False
        if index is None:
            self.failures[None] = 0
        elif result is None:
            self.unassigned, self.untried = len(self.returned), iter(())  # past the last shard
        else:
            entry, seconds = result
            self.run.add(index, entry)
            self.watch.report_shard(entry)
            self.watch.committed(index, entry, seconds)
        return True

    def _note_failure(self, index: int | None, error: Exception) -> None:
        self.failures[index] += 1
        self.last_error = error
        if index is not None:
            if self.failures[index] == _TRIES:
                raise _too_many_failures(_TRIES, f"making shard {index}", error)
            self.unassigned += 1
            heappush(self.returned, index)

    def _replace_worker(self, worker: _WorkerState, index: int | None) -> None:
        """Start another worker in place of a failed one.

        If `_TRIES` starts in a row have failed, the run continues with the other workers instead:
        workers on one broken machine must not use up the attempts of the rest.
        """
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        if index is not None or self.failures[None] < _TRIES:
            self._start_worker()
        elif self.workers:
            print(
                f"Ray workers fail to start: the run continues with {len(self.workers)} others",
                file=sys.stderr,
            )
        else:
            raise _too_many_failures(self.failures[None], "starting", self.last_error)

    def _start_worker(self) -> None:
        worker = _WorkerState(self.actor.remote(*self.arguments))
        self.workers.append(worker)
        self.tasks[worker.actor.start.remote()] = worker, None

    def _assign(self) -> None:
        """Assign shards; a second one only to workers that leave one for each starting worker."""
        while ready := [each for each in self.workers if each.shards in range(_SHARDS_PER_WORKER)]:
            worker = min(ready, key=lambda each: each.shards or 0)
            starting = sum(each.shards is None for each in self.workers)
            if self.unassigned <= (starting if worker.shards else 0):
                return
            index = heappop(self.returned) if self.returned else next(self.untried)
            self.unassigned -= 1
            worker.shards = (worker.shards or 0) + 1
            self.tasks[worker.actor.make.remote(index)] = worker, index


def _too_many_failures(failures: int, what: str, error: Exception) -> UserError:
    return UserError(
        f"{failures} Ray workers failed while {what}, most likely out of memory: "
        f"{one_line(error)}: finished shards are kept: run again with fewer --workers, a smaller "
        "--gpu-memory-utilization or --max-length"
    )


def _room(ray: Any, stage: Stage, workers: int | None) -> _Room:
    """The workers to start. Raises UserError if Ray lacks the resources for them."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [each for each in alive if each.get("CPU", 0) >= 1]  # a head node may have none
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
    """Ray, connected to a cluster, or with a local cluster that is stopped after the block."""
    if find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed: pip install 'qpipe[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # default: sends usage data
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # default: prints a warning
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            # otherwise an engine's child processes would outlive its worker and keep GPU memory
            "_system_config": {
                "kill_child_processes_on_worker_exit_with_raylet_subreaper": True,
                "worker_niceness": 0,  # default: workers run at low priority
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
        with ends_in_order():  # again: ray.init installs its own signal handler
            yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UserError if HOST:PORT refuses connections; Ray itself would retry for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto", or left to Ray's own check
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(f"at --ray-address {address}", error) from error


def _unreachable(where: str, error: Exception) -> UserError:
    return UserError(
        f"Ray cannot be reached {where}: {one_line(error)}: start a cluster with `ray start "
        "--head`, or leave --ray-address out"
    )
