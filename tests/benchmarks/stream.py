"""How fast a target folder streams: read, decoded, planned and collated on one core.

    python tests/benchmarks/stream.py [FOLDER]

A folder is made up (200 tokens and 100 supervised positions a row, supports of 1 to 64 ids, 30 in
the mean, packed as build-targets does) and kept in FOLDER for the next run. Steps of 65,536 tokens
are cut into micro-batches of 8,192, padded and packed; a resumed stream starts in the middle of the
folder. Medians of the runs, all layouts in turns; no model and no prefetching take part.

Then how long a consumer waits that takes steps of 8,192 tokens from the trainer's prefetching
thread at a given rate: it sleeps where a model would compute on a device. The lowest rate is above
8 times what SmolLM2-135M takes on two cores, some 150 supervised positions/s in train_step.py.

The same consumer also streams from an S3 server on loopback that delays each request by 50 ms. The
folder there has as many record batches in shards of one each, so every window of the order needs
16 shards that were not fetched before. This runs on all cores, before everything else, and on one.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from qpipe.pipeline.folders.manifest import Identity, identity_schema
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import BATCH_ROWS, ShardContent
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.packing import Packing
from qpipe.pipeline.format.schema import TARGETS_VERSION, schema_of
from qpipe.pipeline.storage.remote import open_path
from qpipe.pipeline.threads import Prefetch
from qpipe.tests.support.s3 import BUCKET, Bucket, lead_to, s3_server
from qpipe.trainer.data.batch import Batch, packed_batch, padded_batch
from qpipe.trainer.data.steps import micro_batches, read_steps, steps_of_tokens
from qpipe.trainer.data.stream import TargetStream, open_streams
from qpipe.trainer.run.loop import STEPS_AHEAD

VOCAB_SIZE, TOKENS, POSITIONS = 49152, 200, 100
MEAN_SUPPORT, MAX_SUPPORT = 30, 64
SHARDS, SHARD_BATCHES = 16, 8
STEP_TOKENS, BATCH_TOKENS = 65536, 8192
RUNS = 7
RATES = (2_000, 50_000, 250_000, 500_000)  # positions/s of the consumers that wait
STEPS = 16  # that each of them takes
REMOTE_RATE, DELAY = 250_000, 0.05  # positions/s, seconds a request


def main(folder: Path) -> None:
    """Make the folder, then measure."""
    make_targets(folder / "targets", SHARD_BATCHES)
    make_targets(folder / "small-shards", 1)
    small = folder / "small-shards"
    with in_bucket(small) as remote:
        compare_remote(f"{os.cpu_count()} cores", small, remote)
    with in_bucket(small) as remote:  # its server may use every core
        one_core()
        measure_local(folder)
        compare_remote("one core", small, remote)


def compare_remote(cores: str, local: Path, remote: Path) -> None:
    """Print how long a consumer waits for a folder on a local disk, and for it in a bucket."""
    for name, folder in (("a local disk", local), (f"S3, {DELAY * 1000:.0f} ms", remote)):
        stream, _ = open_streams(open_sealed(folder), 0.0)
        first, later = waiting(stream, REMOTE_RATE, steps=10_000)
        print(
            f"on {cores}, from {name}, a consumer of {REMOTE_RATE:,} positions/s waits {later:6.2%}"
            f" of the time of an epoch, and {first:.3f} s for its first step"
        )


def measure_local(folder: Path) -> None:
    """Print how fast a local folder streams, and how long consumers wait."""
    start = perf_counter()
    targets = open_sealed(folder / "targets")
    positions = targets.manifest.totals["positions"]
    stream, _ = open_streams(targets, 0.0)
    opening = perf_counter() - start
    print(f"{positions:,} positions, one of {os.cpu_count()} cores, load {os.getloadavg()}")
    print(f"opened and verified at {positions / opening:,.0f} positions/s")
    half = len(stream) // 2
    ways = {
        "padded": lambda: batches(stream, 0, False),
        "packed": lambda: batches(stream, 0, True),
        "padded, resumed at the middle": lambda: batches(stream, half, False),
        "padded, rank 0 of 2": lambda: batches(stream, 0, False, world_size=2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            speed, first = measure(way)
            speeds[name].append(speed)
            firsts[name].append(first)
    for name in ways:
        low, high = min(speeds[name]), max(speeds[name])
        print(
            f"{name:30} {median(speeds[name]):9,.0f} positions/s ({low:,.0f} to {high:,.0f}), "
            f"first batch after {median(firsts[name]):.3f} s"
        )
    for rate in RATES:
        first, later = waiting(stream, rate)
        print(
            f"a consumer of {rate:7,} positions/s waits {later:6.2%} of the time, "
            f"and {first:.3f} s for its first step"
        )


@contextmanager
def in_bucket(folder: Path) -> Iterator[Path]:
    """A copy of a folder at an S3 server with slow answers, and an empty cache."""
    with s3_server(delay=DELAY) as address, tempfile.TemporaryDirectory() as cache:
        os.environ["QPIPE_CACHE"] = cache
        lead_to(address)
        bucket = Bucket(address)
        with ThreadPoolExecutor(16) as pool:
            for path in folder.iterdir():
                pool.submit(bucket.put, f"{folder.name}/{path.name}", path.read_bytes())
        yield open_path(f"s3://{BUCKET}/{folder.name}")


def one_core() -> None:
    """Keep the process, and the threads of its libraries, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def batches(
    stream: TargetStream, start: int, packed: bool, world_size: int = 1, tokens: int = STEP_TOKENS
) -> Iterator[Batch]:
    """The batches of the first rank, from a sample to the end of the epoch."""
    lengths = stream.lengths(0, range(start, len(stream)))
    steps = steps_of_tokens(lengths, start, tokens)
    plans = (micro_batches(step, 0, world_size, BATCH_TOKENS, packed) for step in steps)
    join = packed_batch if packed else padded_batch
    return (join(batch) for step in read_steps(stream, 0, plans) for batch in step)


def measure(way: Callable[[], Iterator[Batch]]) -> tuple[float, float]:
    """Supervised positions a second, and the seconds until the first batch."""
    start = perf_counter()
    made = way()
    positions = next(made).tokens
    first = perf_counter() - start
    positions += sum(batch.tokens for batch in made)
    return positions / (perf_counter() - start), first


def waiting(stream: TargetStream, rate: float, steps: int = STEPS) -> tuple[float, float]:
    """Seconds until the first step is there, and the share of the time afterwards that the later
    ones are waited for."""
    made = islice(batches(stream, 0, True, tokens=BATCH_TOKENS), steps)
    with Prefetch(made, STEPS_AHEAD) as ready:
        first = next(ready)
        begin, before = perf_counter(), ready.waited
        sleep(first.tokens / rate)
        for batch in ready:
            sleep(batch.tokens / rate)
        return before, (ready.waited - before) / (perf_counter() - begin)


def make_targets(folder: Path, shard_batches: int) -> None:
    """A sealed folder of made-up targets, with so many record batches a shard."""
    schema = schema_of("build-targets", VOCAB_SIZE, Packing("uint8", VOCAB_SIZE, MAX_SUPPORT + 1))
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "mean_support": MEAN_SUPPORT}
    settings |= {"precision": "uint8", "max_support": MAX_SUPPORT}
    settings |= {"tokenizer_hash": "none", "method": "sft+kl", "form": "frozen-target"}
    settings |= {"parameters": {}, "residual": "base", "tail_shape": "student", "top_p": 0.99}
    identity = Identity(
        "build-targets", settings, {"made": "up"}, identity_schema(schema), TARGETS_VERSION
    )
    job = Job(folder, schema, identity, parents={}, provenance={})
    if open_folder(folder, identity) is not None:
        return
    run = ShardRun(job)

    def shard(index: int) -> ShardContent:
        first = index * shard_batches
        return ShardContent([made_up(number) for number in range(first, first + shard_batches)])

    count = SHARDS * SHARD_BATCHES // shard_batches
    run.make((index, lambda index=index: shard(index)) for index in range(count))
    run.seal()


def made_up(number: int) -> FlatBatch:
    """A batch of targets: ids of a narrow range at each position, probabilities that fall off."""
    rng = np.random.default_rng(number)
    size = BATCH_ROWS * POSITIONS
    # most supports are small, some as wide as can be: 30 in the mean
    counts = np.clip(rng.gamma(1.3, 27.5, size), 1, MAX_SUPPORT).astype(np.int32)
    position_of = np.repeat(np.arange(size), counts)
    rank_of = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[position_of]
    first_id = rng.integers(0, VOCAB_SIZE - 2 * MAX_SUPPORT, size)
    step = rng.choice([1, 3, 5, 7], size)  # odd: a permutation of the 128 ids
    ids = first_id[position_of] + (rank_of * step[position_of]) % (2 * MAX_SUPPORT)
    falls = np.exp(-0.3 * rank_of - rng.exponential(0.3, len(ids)))
    totals = np.bincount(position_of, falls, size)
    lengths = np.ones(BATCH_ROWS, np.int64)
    tokens = rng.integers(0, VOCAB_SIZE, (BATCH_ROWS, TOKENS))
    tokens[:, -POSITIONS:] = first_id.reshape(BATCH_ROWS, POSITIONS)  # the first of each support
    return FlatBatch(
        [f"{number}-{row}" for row in range(BATCH_ROWS)],
        {
            "input_ids": tokens.ravel().astype(np.int32),
            "positions": np.tile(np.arange(TOKENS - POSITIONS, TOKENS, dtype=np.int32), BATCH_ROWS),
            "trust": rng.uniform(0, 1, size).astype(np.float32),
            "counts": counts,
            "support_ids": ids.astype(np.int32),
            "support_probs": (0.99 * falls / totals[position_of]).astype(np.float32),
            "tail_mass": np.full(size, 0.01, np.float32),
            "weights": np.ones(size, np.float32),
        },
        {
            "token": lengths * TOKENS,
            "position": lengths * POSITIONS,
            "entry": counts.reshape(BATCH_ROWS, -1).sum(axis=1).astype(np.int64),
        },
    )


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    chosen.mkdir(parents=True, exist_ok=True)
    main(chosen)
