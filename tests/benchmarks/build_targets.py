"""How fast `qpipe build-targets` is, and whether its memory grows with the data.

    python tests/benchmarks/build_targets.py [FOLDER]

First the default method beside a plain script: the same rows read with pyarrow, a loop over the
positions in numpy, the same supports written as lists to parquet.

Score folders of a base and a teacher are made up (k = 64, vocabulary 49,152, 100 supervised
positions a demonstration), in two sizes, and kept in FOLDER for the next run. Each method is built
three times from the larger folder, in turns; the medians are of whole stages: reading and
verifying, the targets, their ceiling, compressing and writing, after a first small folder has
loaded the libraries. Peak memory is that of a process which does nothing else.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from qpipe.pipeline.folders.manifest import Identity, identity_schema, read_manifest
from qpipe.pipeline.folders.sealed import read_scores
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import BATCH_ROWS, ShardContent
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.commands.tables import print_table
from qpipe.tests.benchmarks.figures import Figure, faster, publish, take_turns

VOCAB_SIZE, TOP_K, TOKENS, POSITIONS = 49152, 64, 200, 100
SHARD_BATCHES = 8
SMALL, LARGE = 4, 16  # shards
RUNS = 3
METHODS = (
    ("sft+kl", "frozen-target"),
    ("dft", "frozen-target"),
    ("dft", "frozen-weight"),
    ("dft", "live"),
    ("asft", "live"),
    ("gift", "frozen-target"),
    ("flow", "frozen-weight"),
    ("kd", "frozen-target"),
    ("target-sft", "live"),
    ("target-sft", "frozen-target"),
    ("token-cleaning", "frozen-weight"),
)
WITH_TEACHER = ("kd", "target-sft", "token-cleaning")
_BUILD = """
import json, sys, time
from pathlib import Path
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
folder, shards, out, method, form, has_teacher = sys.argv[1:]
def build(shards, out):
    teacher = (Path(f"{folder}/teacher-{shards}"),) if has_teacher == "yes" else ()
    scores = Path(f"{folder}/base-{shards}")
    return build_targets(BuildSettings(
        scores=scores, out=Path(out), choice=choose(method, form), teacher=teacher))
build(1, out + "-warm")
start = time.perf_counter()
result = build(shards, out)
seconds = time.perf_counter() - start
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps([result.positions / seconds, peak / 1024]))
"""


def main(folder: Path) -> None:
    """Make the folders, then measure."""
    for shards in (1, SMALL, LARGE):
        for model in ("base", "teacher"):
            make_scores(folder / f"{model}-{shards}", model, shards)
    compare_with_plain(folder / "base-1")
    speeds: dict[tuple[str, str], list[float]] = {each: [] for each in METHODS}
    peaks: dict[tuple[str, str], dict[int, float]] = {each: {} for each in METHODS}
    for _ in range(RUNS):
        for each in METHODS:
            speed, peaks[each][LARGE] = build(folder, LARGE, *each)
            speeds[each].append(speed)
    for each in METHODS:
        _, peaks[each][SMALL] = build(folder, SMALL, *each)
    positions = LARGE * SHARD_BATCHES * BATCH_ROWS * POSITIONS
    print(f"{positions:,} positions, k = {TOP_K}, {os.cpu_count()} cores, load {os.getloadavg()}")
    head = ("method", "form", "positions/s", "spread", "peak MiB", f"{LARGE // SMALL}x the data")
    rows = [
        (
            *each,
            f"{median(speeds[each]):,.0f}",
            f"{min(speeds[each]):,.0f} to {max(speeds[each]):,.0f}",
            f"{peaks[each][SMALL]:.0f}",
            f"{peaks[each][LARGE] / peaks[each][SMALL]:.2f}x the memory",
        )
        for each in METHODS
    ]
    print_table([head, *rows])


def compare_with_plain(scores: Path) -> None:
    """How many times as fast the stage is as a plain script, and how many times as small."""
    kept = {"ours": 0, "theirs": 0}
    with tempfile.TemporaryDirectory() as made:
        numbers = count()

        def ours() -> None:
            out = Path(made) / f"{next(numbers)}"
            build_targets(BuildSettings(scores, out, choose("sft+kl")))
            kept["ours"] = sum(path.stat().st_size for path in out.iterdir())

        def theirs() -> None:
            kept["theirs"] = plain_script(scores, Path(made) / "plain.parquet")

        seconds = take_turns({"ours": ours, "theirs": theirs}, RUNS)
    positions = read_manifest(scores).totals["positions"]
    times = seconds["ours"], "a loop in numpy", seconds["theirs"]
    sizes = {name: size / positions for name, size in kept.items()}
    ratio = sizes["theirs"] / sizes["ours"]
    small, large = (f"{sizes[name]:.0f} B/token" for name in ("ours", "theirs"))
    publish(
        [
            faster("build targets", *times, positions, "positions"),
            Figure(
                "targets on disk", small, f"lists in parquet, zstd: {large}", ratio, *[ratio] * 2
            ),
        ]
    )


def plain_script(scores: Path, out: Path) -> int:
    """What one writes first; the bytes of its file."""
    rows: dict[str, list[Any]] = {name: [] for name in ("input_ids", "ids", "log_probs", "tail")}
    for example in read_scores(scores):
        starts = np.cumsum(example.counts) - example.counts
        ids, log_probs, tails = [], [], []
        for start, size in zip(starts, example.counts, strict=True):
            probs = np.exp(example.topk_log_probs[start : start + size])
            most = int(np.searchsorted(np.cumsum(probs), 0.99)) + 1
            ids.append(example.topk_ids[start : start + most])
            log_probs.append(example.topk_log_probs[start : start + most])
            tails.append(1 - probs[:most].sum())
        rows["input_ids"].append(example.input_ids)
        rows["ids"].append(ids)
        rows["log_probs"].append(log_probs)
        rows["tail"].append(tails)
    pq.write_table(pa.table(rows), out, compression="zstd")
    return out.stat().st_size


def build(folder: Path, shards: int, method: str, form: str) -> tuple[float, float]:
    """Positions a second and peak MiB of one run of the stage in a process of its own."""
    has_teacher = "yes" if method in WITH_TEACHER else "no"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        arguments = [str(folder), str(shards), f"{out}/targets", method, form, has_teacher]
        command = [sys.executable, "-c", _BUILD, *arguments]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    speed, peak = json.loads(done.stdout)
    return speed, peak


def make_scores(folder: Path, model: str, shards: int, top_k: int = TOP_K) -> None:
    """A sealed folder of made-up scores; both models share most of their top k."""
    schema = schema_of("score", VOCAB_SIZE)
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "top_k": top_k}
    settings |= {"tokenizer_hash": "none", "model": model}
    identity = Identity("score", settings, {"made": "up"}, identity_schema(schema))
    job = Job(folder, schema, identity, parents={}, provenance={})
    if open_folder(folder, identity) is not None:
        return
    run = ShardRun(job)

    def shard(index: int) -> ShardContent:
        first = index * SHARD_BATCHES
        numbers = range(first, first + SHARD_BATCHES)
        batches = [made_up(model, number, top_k) for number in numbers]
        return ShardContent(batches, sums={"observed_nll": 0.0, "tail_mass": 0.0})

    run.make((index, lambda index=index: shard(index)) for index in range(shards))
    run.seal()


def made_up(model: str, number: int, top_k: int = TOP_K) -> FlatBatch:
    """A batch of scores: ids of a narrow range at each position, probabilities that fall off."""
    size = BATCH_ROWS * POSITIONS
    shared = np.random.default_rng(number)
    first_id = shared.integers(0, VOCAB_SIZE - 2 * top_k, (size, 1))
    observed = (first_id[:, 0] + shared.integers(0, 8, size)).reshape(BATCH_ROWS, POSITIONS)
    tokens = shared.integers(0, VOCAB_SIZE, (BATCH_ROWS, TOKENS))
    tokens[:, -POSITIONS:] = observed

    own = np.random.default_rng((number, model == "teacher"))
    ids = first_id + np.argsort(own.random((size, top_k + 8)), axis=1)[:, :top_k]
    falls = own.exponential(own.gamma(2, 0.3, (size, 1)), (size, top_k)).cumsum(axis=1)
    log_probs = np.log(0.985) - falls - np.logaddexp.reduce(-falls, axis=1, keepdims=True)
    is_observed = ids == observed.reshape(-1, 1)
    observed_log_probs = np.where(is_observed, log_probs, -9.0).max(axis=1)
    lengths = np.ones(BATCH_ROWS, np.int64)
    return FlatBatch(
        [f"{number}-{row}" for row in range(BATCH_ROWS)],
        {
            "input_ids": tokens.ravel().astype(np.int32),
            "positions": np.tile(np.arange(TOKENS - POSITIONS, TOKENS, dtype=np.int32), BATCH_ROWS),
            "observed_log_probs": observed_log_probs.astype(np.float32),
            "observed_ranks": np.ones(size, np.int32),
            "counts": np.full(size, top_k, np.int32),
            "topk_ids": ids.ravel().astype(np.int32),
            "topk_log_probs": log_probs.ravel().astype(np.float32),
            "tail_mass": np.full(size, 0.015, np.float32),
            "token_weights": np.ones(size, np.float32),
        },
        {
            "token": lengths * TOKENS,
            "position": lengths * POSITIONS,
            "entry": lengths * POSITIONS * top_k,
        },
    )


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    chosen.mkdir(parents=True, exist_ok=True)
    main(chosen)
