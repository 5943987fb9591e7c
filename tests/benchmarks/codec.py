"""How fast target shards are packed and unpacked, in supervised positions a second.

    python tests/benchmarks/codec.py [TARGETS]

TARGETS is a target folder; without one, targets are made up whose supports have 30 entries in the
mean. Record batches of 64 rows go to the bytes of an Arrow file, compressed as shards are, and
back to flat arrays with every check of a reader; nothing touches a disk, and no hash is computed.
As many batches at a time as there are threads. The best of several runs, as the machine allows.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shards import BATCH_ROWS, COMPRESSED
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import FlatBatch, flatten
from qpipe.pipeline.format.packing import Packing
from qpipe.pipeline.format.ragged import segment_sums
from qpipe.pipeline.format.schema import Schema, schema_of
from qpipe.stages.commands.tables import print_table

POSITIONS, RUNS = 200_000, 5
VOCAB_SIZE, MOST_ENTRIES = 49152, 64
TOKENS, SUPERVISED = 220, 120  # of a made-up row

Made = TypeVar("Made")


def main(folder: Path | None) -> None:
    """Print the speeds."""
    schema, batches = _made_up() if folder is None else _read(folder)
    batches *= -(-POSITIONS // sum(len(batch["positions"]) for batch in batches))
    positions = sum(len(batch["positions"]) for batch in batches)
    entries = sum(len(batch["support_ids"]) for batch in batches)
    rows = [("threads", "encode", "decode")]
    files: list[pa.Buffer] = []
    for threads in range(1, (os.cpu_count() or 1) + 1):
        with ThreadPoolExecutor(threads) as pool:
            encoding, files = _best(
                lambda p=pool: list(p.map(lambda each: _to_bytes(schema, each), batches))
            )
            decoding, _ = _best(
                lambda p=pool, f=files: list(p.map(lambda each: _from_bytes(schema, each), f))
            )
        rows.append((f"{threads}", f"{positions / encoding:,.0f}", f"{positions / decoding:,.0f}"))
    size = sum(map(len, files)) / positions
    print(
        f"supervised positions a second; {entries / positions:.1f} entries, {size:.1f} bytes each"
    )
    print_table(rows)


def _to_bytes(schema: Schema, batch: FlatBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema.arrow, options=COMPRESSED) as writer:
        writer.write_batch(encode(schema, batch))
    return sink.getvalue()


def _from_bytes(schema: Schema, content: pa.Buffer) -> FlatBatch:
    options = pa.ipc.IpcReadOptions(use_threads=False)  # as readers of shards do
    with pa.ipc.open_file(content, options=options) as reader:
        return decode(schema, reader.get_batch(0), "here")


def _best(work: Callable[[], Made]) -> tuple[float, Made]:
    """The seconds of the best run, and what it made."""
    seconds, made = [], work()
    for _ in range(RUNS):
        start = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), made


def _read(folder: Path) -> tuple[Schema, list[FlatBatch]]:
    schema, examples = open_sealed(folder).schema, list(read_targets(folder))
    starts = range(0, len(examples), BATCH_ROWS)
    return schema, [flatten(schema, examples[start : start + BATCH_ROWS]) for start in starts]


def _made_up() -> tuple[Schema, list[FlatBatch]]:
    """A batch of random targets whose supports have 30 entries in the mean, at most 64."""
    rng = np.random.default_rng(0)
    size = BATCH_ROWS * SUPERVISED
    counts = np.minimum(rng.geometric(1 / 36, size), MOST_ENTRIES)
    steps = 1 + rng.lognormal(2, 1.2, counts.sum()).astype(np.int64)
    ends = np.cumsum(steps)
    before = np.repeat(np.append(0, ends)[np.cumsum(counts) - counts], counts)
    weights, tail = rng.lognormal(0, 2.5, len(steps)), rng.lognormal(0, 1, size)
    total = segment_sums(weights, counts) + tail
    first = TOKENS - SUPERVISED
    arrays = {
        "input_ids": rng.integers(0, VOCAB_SIZE, BATCH_ROWS * TOKENS),
        "positions": np.tile(np.arange(first, TOKENS), BATCH_ROWS),
        "counts": counts,
        "support_ids": (ends - before) % VOCAB_SIZE,
    }
    floats = {
        "support_probs": weights / np.repeat(total, counts),
        "tail_mass": tail / total,
        "trust": np.full(size, 0.9),
        "weights": np.full(size, 1.1),
    }
    lengths = {
        "token": np.full(BATCH_ROWS, TOKENS),
        "position": np.full(BATCH_ROWS, SUPERVISED),
        "entry": counts.reshape(BATCH_ROWS, SUPERVISED).sum(1),
    }
    stored = {name: values.astype(np.int32) for name, values in arrays.items()}
    stored |= {name: values.astype(np.float32) for name, values in floats.items()}
    schema = schema_of("build-targets", VOCAB_SIZE, Packing("uint8", VOCAB_SIZE, MOST_ENTRIES))
    return schema, [FlatBatch([f"row {row}" for row in range(BATCH_ROWS)], stored, lengths)]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
