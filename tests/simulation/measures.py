"""What single parts cost on this machine, one core: hashing, opening, planning, manifests."""

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace
from qpipe.pipeline.folders.manifest import (
    read_manifest,
    shard_name,
    totals_of,
    write_manifest,
)
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed
from qpipe.pipeline.folders.shards import BATCH_ROWS
from qpipe.tests.simulation.opening import ROWS, make_folder
from qpipe.trainer.data.steps import Step, micro_batches
from qpipe.trainer.data.stream import Outline, TargetStream, epoch_of, open_streams

SUMS = 28  # that build-targets adds up of a shard


@dataclass(frozen=True)
class Measures:
    """Seconds, bytes and rates of one core."""

    hash_rate: float  # bytes a second
    open_rate: float  # demonstrations a second, from the index, and the manifest
    length_seconds: float  # of a sample, as steps are cut
    plan_seconds: float  # of a step of 8,000 samples, on each of 1,000 ranks
    epoch_seconds: float  # to order ten million samples
    row_bytes: float  # that an open stream keeps of a demonstration
    opening_bytes: float  # of a demonstration at most, while it is opened
    entry_bytes: float  # of a shard in a manifest of targets
    entry_seconds: float  # to read it
    entry_memory: float  # bytes at most, while it is read


def measure(root: Path, shards: int = 400, entries: int = 5000, rows: int = 10**6) -> Measures:
    """Measure all of them; the folders are made under `root`."""
    pa.set_cpu_count(1)
    folder = make_folder(root / "opened", shards)
    opened = _seconds(lambda: open_streams(open_sealed(folder), 0.01))
    outlined = _outlined(rows)
    manifest, read_seconds, memory = _manifest(root / "many", folder, entries)
    content = os.urandom(2**24)
    numbers = range(min(rows, 200_000))
    step = Step(0, tuple(np.random.default_rng(0).integers(50, 1500, 8000).tolist()))
    return Measures(
        hash_rate=len(content) / _seconds(lambda: hashlib.sha256(content)),
        open_rate=shards * ROWS / opened,
        length_seconds=_seconds(lambda: sum(outlined.lengths(0, numbers))) / len(numbers),
        plan_seconds=_seconds(lambda: micro_batches(step, 7, 1000, 8192, False)),
        epoch_seconds=_seconds(lambda: epoch_of(outlined.outline, 0, 1)) * 10**7 / rows,
        row_bytes=sum(_size(getattr(outlined.outline, n)) for n in Outline.__slots__) / rows,
        opening_bytes=_opening_bytes(folder) / (shards * ROWS),
        entry_bytes=manifest / entries,
        entry_seconds=read_seconds / entries,
        entry_memory=memory / entries,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The least of three tries."""
    times = []
    for _ in range(3):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def _size(array: Any) -> int:
    return array.nbytes


def _outlined(rows: int) -> TargetStream:
    blocks = rows // BATCH_ROWS
    ones = np.ones(blocks * BATCH_ROWS, np.int32)
    outline = Outline(
        shards=np.zeros(blocks, np.int32),
        numbers=np.arange(blocks, dtype=np.int32),
        starts=np.arange(blocks + 1) * BATCH_ROWS,
        places=np.tile(np.arange(BATCH_ROWS, dtype=np.int32), blocks),
        tokens=400 * ones,
    )
    return TargetStream(SealedFolder(Path(), None), outline)  # type: ignore


def _opening_bytes(folder: Path) -> int:
    """Bytes at most, as a folder is opened."""
    tracemalloc.start()
    open_streams(open_sealed(folder), 0.01)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _manifest(folder: Path, like: Path, entries: int) -> tuple[int, float, int]:
    """Of a manifest of targets: its bytes, the seconds and the memory that it takes to read."""
    folder.mkdir()
    manifest = read_manifest(like)
    rng = np.random.default_rng(0)
    made = []
    for index in range(entries):
        sums = {f"ceiling.divergence.{n}": float(rng.random() * 1e4) for n in range(SUMS)}
        entry = replace(manifest.shards[0], file=shard_name(index), sums=sums)
        made.append(replace(entry, sha256=hashlib.sha256(bytes(index)).hexdigest()))
    write_manifest(folder, replace(manifest, shards=made, totals=totals_of(made)))
    seconds = _seconds(lambda: read_manifest(folder))
    tracemalloc.start()
    read_manifest(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (folder / "manifest.json").stat().st_size, seconds, peak
