"""Opens a target folder of 10^9 supervised tokens as a rank of a training run does.

    python tests/simulation/opening.py [SHARDS] [RANK] [WORLD_SIZE]

The folder has 7,813 shards by default, each of 512 demonstrations of 250 supervised tokens. One
shard is made, and the others are links to it, so that the folder takes the disk space of one; the
sidecars, the index and the manifest are real, and so is all code that reads. Printed are the
seconds until the folder is open and until the first micro-batch of the rank is decoded, and the
memory that this process has taken for both, beyond its libraries.
"""

import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from msgspec.structs import replace
from qpipe.pipeline.folders.manifest import Identity, identity_schema, shard_name
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import (
    BATCH_ROWS,
    ShardContent,
    commit_shard,
    read_sidecar,
    write_sidecar,
)
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.packing import Packing
from qpipe.pipeline.format.schema import TARGETS_VERSION, schema_of
from qpipe.trainer.data.batch import Collator
from qpipe.trainer.data.steps import StepLoader
from qpipe.trainer.data.stream import open_streams

SHARDS = 7_813
ROWS, TOKENS, SUPERVISED, ENTRIES = 512, 400, 250, 30
VOCAB_SIZE = 49_152
_SUMS = {f"ceiling.sum.{number}": 1.0 / (3 + number) for number in range(28)}


def main(shards: int, rank: int, world_size: int) -> None:
    """Make the folder, open it in this process, and print."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = make_folder(Path(name) / "targets", shards)
        child = os.fork()  # a process that has not made the folder
        if child == 0:
            print(opened(folder, rank, world_size))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


def opened(folder: Path, rank: int, world_size: int) -> str:
    """Seconds and memory of opening the folder and of the first batch, in words."""
    before, start, cpu_start = _resident(), perf_counter(), process_time()
    stream, _ = open_streams(open_sealed(folder, "build-targets"), 0.01)
    open_seconds = perf_counter() - start
    loader = StepLoader(stream, 0, 16 * world_size, None, 8192, Collator(True), rank, world_size)
    size = loader.size(1.0)
    steps = loader.steps_between(0, size.samples)
    _, batches = next(loader.load(islice(steps, 4)))
    seconds = perf_counter() - start
    computing, memory = process_time() - cpu_start, (_peak() - before) / 2**20
    return (
        f"rank {rank} of {world_size}: {folder_size(folder)}, {len(stream):,} samples, opened in "
        f"{open_seconds:.1f} s, {batches[0].tokens:,} tokens of the first batch after "
        f"{seconds:.1f} s ({computing:.1f} s of computing), {memory:.0f} MiB"
    )


def folder_size(folder: Path) -> str:
    """The supervised tokens and shards of a folder, in words."""
    manifest = open_sealed(folder).manifest
    return f"{manifest.totals['positions']:,} supervised tokens in {len(manifest.shards):,} shards"


def make_folder(folder: Path, shards: int) -> Path:
    """A sealed folder whose shards are links to one file; their sidecars are their own."""
    packing = Packing("uint8", VOCAB_SIZE, 64)
    schema = schema_of("build-targets", VOCAB_SIZE, packing)
    settings = {
        "vocab_size": VOCAB_SIZE, "tokenizer_hash": "made up", "method": "sft+kl",
        "form": "frozen-target", "parameters": {"lam": 0.1}, "residual": "base",
        "tail_shape": "student", "top_p": 0.99, "max_support": 63, "precision": "uint8",
    }  # fmt: skip
    identity = Identity("build-targets", settings, {}, identity_schema(schema), TARGETS_VERSION)
    open_folder(folder, identity)
    content = ShardContent([_made_up(number) for number in range(ROWS // BATCH_ROWS)], sums=_SUMS)
    entry = commit_shard(folder, 0, schema, identity.fingerprint, content)
    _, outline = read_sidecar(folder, 0)
    run = ShardRun(Job(folder, schema, identity, {}, {}))
    for index in range(1, shards):
        os.link(folder / shard_name(0), folder / shard_name(index))
        own = replace(entry, file=shard_name(index))
        write_sidecar(folder, index, own, outline)
        run.add(index, own)
    run.seal()
    return folder


def _made_up(number: int) -> FlatBatch:
    rng = np.random.default_rng(number)
    positions = BATCH_ROWS * SUPERVISED
    ids = (rng.integers(0, VOCAB_SIZE, (positions, 1)) + 7 * np.arange(ENTRIES)) % VOCAB_SIZE
    tokens = rng.integers(0, VOCAB_SIZE, (BATCH_ROWS, TOKENS))
    probs = np.full((positions, ENTRIES), 0.99 / ENTRIES, np.float32)
    ones = np.ones(positions, np.float32)
    each = np.ones(BATCH_ROWS, np.int64)
    return FlatBatch(
        [f"{number}-{row}" for row in range(BATCH_ROWS)],
        {
            "input_ids": tokens.ravel().astype(np.int32),
            "positions": np.tile(
                np.arange(TOKENS - SUPERVISED, TOKENS, dtype=np.int32), BATCH_ROWS
            ),
            "trust": 0.9 * ones,
            "counts": np.full(positions, ENTRIES, np.int32),
            "support_ids": ids.ravel().astype(np.int32),
            "support_probs": probs.ravel(),
            "tail_mass": 0.01 * ones,
            "weights": ones,
        },
        {
            "token": each * TOKENS,
            "position": each * SUPERVISED,
            "entry": each * SUPERVISED * ENTRIES,
        },
    )


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """The most bytes that were in memory since `exec` or `clear_refs`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:]]
    main(*(given + [SHARDS, 37, 64][len(given) :]))
