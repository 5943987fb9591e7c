"""A stage's shards made by a thousand workers that are slow, die, come back, or never do.

The stage makes a tiny shard and takes virtual seconds for it. All else is real: `run_task` on real
files with real locks and claims, and `run_on_ray`, whose workers are those of `fake_ray`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from qpipe.pipeline.folders import shard_run as runner
from qpipe.pipeline.folders import tasks as executors
from qpipe.pipeline.folders import watch as progress
from qpipe.pipeline.folders.manifest import Identity, ShardEntry, identity_schema
from qpipe.pipeline.folders.shard_run import Job, StageResult
from qpipe.pipeline.folders.shards import ShardContent
from qpipe.pipeline.folders.tasks import TaskResult, TaskShare, run_alone, run_task
from qpipe.pipeline.folders.watch import Report, Watcher
from qpipe.pipeline.format.batches import flatten
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.storage import locks
from qpipe.stages.execution import ray as ray_cluster
from qpipe.tests.simulation.fake_ray import FakeRay
from qpipe.tests.simulation.world import NEVER, Files, Process, World
from qpipe.tests.support.examples import scored
from qpipe.tests.support.folders import VOCAB_SIZE
from tqdm import tqdm

WATCHER = Watcher("score", "simulated")


@dataclass(frozen=True)
class Trouble:
    """What goes wrong, and how often; all seconds are virtual."""

    shards: int
    workers: int
    seconds: float = 10.0  # a shard's, in the median; they spread by a quarter
    stragglers: float = 0.01  # share of the shards that take five times as long
    slow: float = 0.02  # share of the workers that take twice as long for all
    starting: float = 60.0  # until an engine is ready
    mean_life: float = 1500.0  # of a worker, seconds
    at_a_file: float = 0.03  # share of the workers that die as they touch a file
    absence: float = 120.0  # until one that died is there again
    never_back: int = 1  # ranks whose first death is their last
    twins: int = 5  # ranks that are started twice at the same time
    seed: int = 0

    def shard_seconds(self) -> list[float]:
        """How long each shard takes."""
        rng = np.random.default_rng((self.seed, 1))
        seconds = self.seconds * np.exp(0.25 * rng.standard_normal(self.shards))
        return (seconds * np.where(rng.random(self.shards) < self.stragglers, 5, 1)).tolist()

    def slownesses(self) -> list[float]:
        """How many times as long each worker takes."""
        rng = np.random.default_rng((self.seed, 2))
        return np.where(rng.random(self.workers) < self.slow, 2.0, 1.0).tolist()

    def ideal(self) -> float:
        """Seconds if nobody died, and each worker were handed just what it can do."""
        return self.starting + sum(self.shard_seconds()) / sum(1 / s for s in self.slownesses())


@dataclass
class Outcome:
    """How it went."""

    seconds: float  # until the folder was sealed, virtual
    first_seconds: float  # until all but the lost had ended
    deaths: int
    lost: float  # seconds of work that died
    made: int  # shards, those that were made twice counted twice
    sealers: int  # processes that sealed the folder
    operations: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0


class TinyStage:
    """Shards of one short demonstration each."""

    gpus = 1
    demonstrations = None

    def __init__(
        self, folder: Path, shards: int, world: World | None = None, trouble: Trouble | None = None
    ) -> None:
        schema = schema_of("score", VOCAB_SIZE)
        settings = {"vocab_size": VOCAB_SIZE, "top_k": 4, "tokenizer_hash": "none"}
        identity = Identity("score", settings, {"shards": str(shards)}, identity_schema(schema))
        self.job = Job(folder, schema, identity, {}, {"model": "made-up"})
        self.shard_count = shards
        self.world = world
        self.starting = trouble.starting if trouble else 0.0
        self.seconds = trouble.shard_seconds() if trouble else []
        self.made: list[int] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return TinyStage, (self.job.folder, self.shard_count)

    def start(self) -> None:
        if self.world is not None:
            self.world.sleep(self.starting)

    def read(self, index: int) -> int | None:
        return index if index < self.shard_count else None

    def make(self, index: int, report: Report, /) -> ShardContent:
        if self.world is not None:
            self.world.work(self.seconds[index])
        self.made.append(index)
        row = scored(f"row-{index}", [1 + index % 300, 2], [{2: 0.25 + 0.5 / (1 + index)}])
        return ShardContent([flatten(self.job.schema, [row])], sums={"tail_mass": 0.5})

    def check(self, shards: Sequence[ShardEntry]) -> None:
        assert len(shards) == self.shard_count


def run_undisturbed(folder: Path, shards: int) -> str:
    """The folder as one process makes it: its hash."""
    with without_bars():
        run_alone(TinyStage(folder, shards), WATCHER)
    return folder_hash(folder)


def run_array(folder: Path, trouble: Trouble, rate: float = NEVER, delay: float = 0.0) -> Outcome:
    """An array of tasks; where it leaves something, a second array of another size does the rest.

    `rate` and `delay` are those of the file system.
    """
    world = World()
    files = Files(folder, world, rate, delay)
    stage = TinyStage(folder, trouble.shards, world, trouble)
    rng = np.random.default_rng((trouble.seed, 3))
    processes: list[Process] = []

    def submit(rank: int, world_size: int, start: float, comes_back: bool) -> None:
        def again(process: Process) -> None:
            if process.is_dead and comes_back:
                submit(rank, world_size, world.now + trouble.absence, True)

        life = rng.exponential(trouble.mean_life) if trouble.mean_life < NEVER else NEVER
        operation = int(rng.integers(1, 60)) if rng.random() < trouble.at_a_file else 0
        slowness = slownesses[rank % trouble.workers]
        process = Process(start + life, operation, slowness)
        processes.append(process)
        share = TaskShare(rank, world_size)
        world.spawn(process, start, lambda: run_task(stage, share, WATCHER), again)

    slownesses = trouble.slownesses()
    lost = set(rng.choice(trouble.workers, trouble.never_back, replace=False).tolist())
    with _virtual(world), without_bars(), files.counted():
        for rank in range(trouble.workers):
            submit(rank, trouble.workers, float(rng.uniform(0, 5)), rank not in lost)
        for rank in range(trouble.twins):
            submit(rank, trouble.workers, float(rng.uniform(0, 100)), True)
        for process in processes:
            if lost and process is processes[min(lost)]:
                process.dies_at = min(process.dies_at, trouble.starting + 3 * trouble.seconds)
        world.run()
        first = max(process.ended for process in processes if process.result is not None)
        size = trouble.workers // 10 + 1  # shares no factor with the first
        for rank in range(size if not (folder / "manifest.json").exists() else 0):
            submit(rank, size, world.now, True)
        world.run()
    results = [process.result for process in processes]
    assert all(isinstance(each, StageResult | TaskResult | None) for each in results)
    return Outcome(
        seconds=min(
            p.ended for p in processes if isinstance(p.result, StageResult) and not p.is_dead
        ),
        first_seconds=first,
        deaths=sum(process.is_dead for process in processes),
        lost=sum(process.lost for process in processes),
        made=len(stage.made),
        sealers=sum(isinstance(r, StageResult) and not r.was_done for r in results),
        operations=files.counts,
        bytes_read=files.bytes_read,
    )


def run_ray(folder: Path, trouble: Trouble, broken: int = 0) -> Outcome:
    """The same shards handed out by Ray.

    On the first `broken` GPUs every worker dies five seconds after it was placed there.
    """
    files = Files(folder)
    seconds, slownesses = trouble.shard_seconds(), trouble.slownesses()
    rng = np.random.default_rng((trouble.seed, 4))

    def takes(slot: int, method: str, arguments: tuple[Any, ...]) -> float:
        return trouble.starting if method == "start" else seconds[arguments[0]] * slownesses[slot]

    def life(slot: int) -> float:
        if slot < broken:
            return 5.0
        return float(rng.exponential(trouble.mean_life)) if trouble.mean_life < NEVER else NEVER

    ray = FakeRay(trouble.workers, takes, life, unseen=lambda: rng.random() < 0.1)
    stage = TinyStage(folder, trouble.shards)
    with (
        files.counted(),
        without_bars(),
        patch.object(ray_cluster, "connected", ray.connected),
        patch.object(ray_cluster, "quiet_libraries", lambda: None),
    ):
        result = ray_cluster.run_on_ray(stage, trouble.workers, None, WATCHER)
    assert not result.was_done
    return Outcome(ray.now, ray.now, ray.deaths, ray.lost, 0, 1, files.counts, files.bytes_read)


def folder_hash(folder: Path) -> str:
    """One hash of all names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def _virtual(world: World) -> Iterator[None]:
    """Locks wait in virtual time, and a process does its work by itself, on no threads."""

    def in_turn(function: Any, items: Iterable[Any], workers: int | None = None) -> Iterator[Any]:
        return map(function, items)

    with (
        patch.object(locks, "time", world),
        patch.object(runner, "in_order", in_turn),
        patch.object(executors, "in_order", in_turn),
    ):
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Nothing is shown within the block."""
    with patch.object(progress, "progress_bar", lambda **_: tqdm(disable=True)):
        yield
