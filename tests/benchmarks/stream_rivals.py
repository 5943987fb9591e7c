"""How fast the same target rows come out of this package's stream and out of two others.

    python tests/benchmarks/stream_rivals.py [FOLDER]

The folder that stream.py makes up, and its decoded rows once more as parquet for `datasets` in
streaming mode and as litdata's chunks (`pip install -r requirements/bench.txt`), all shuffled. Each
makes the same padded batches of 8,192 tokens at most, on one core, in turns; a turn is a pass over
all rows. litdata and `datasets` shuffle as they do by default: in a buffer, or within chunks.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import TargetExample
from qpipe.tests.benchmarks.figures import Figure, faster, publish, take_turns
from qpipe.tests.benchmarks.stream import (
    BATCH_TOKENS,
    SHARD_BATCHES,
    batches,
    make_targets,
    one_core,
)
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.data.dataset import TargetDataset
from qpipe.trainer.data.stream import TargetStream, open_streams

RUNS = 3
_INTS = ("input_ids", "positions", "counts", "support_ids")
_FLOATS = ("trust", "support_probs", "tail_mass", "weights")
_FILE_ROWS = 512  # of a parquet file: as a shard has


def main(folder: Path) -> None:
    """Make the rows, then measure."""
    make_targets(folder / "targets", SHARD_BATCHES)
    targets = open_sealed(folder / "targets")
    positions = targets.manifest.totals["positions"]
    stream, _ = open_streams(targets, 0.0)
    make_parquet(folder / "targets", folder / "parquet")
    one_core()
    ways: dict[str, Callable[[], int]] = {
        "qpipe": lambda: sum(batch.tokens for batch in batches(stream, 0, False)),
        "datasets": lambda: drain(rows_of_datasets(folder / "parquet")),
    }
    if find_spec("litdata"):
        make_chunks(stream, folder / "litdata")
        ways["litdata"] = lambda: drain(rows_of_litdata(folder / "litdata"))
    for name, way in ways.items():
        assert way() == positions, f"{name} has lost rows"
    seconds = take_turns(ways, RUNS)
    rivals = {"datasets": "datasets, streaming", "litdata": "litdata"}
    folders = {"qpipe": "targets", "datasets": "parquet", "litdata": "litdata"}
    sizes = {name: size_of(folder / folders[name]) / positions for name in ways}
    publish(
        [
            figure
            for name in ways
            if name != "qpipe"
            for figure in (
                faster(
                    "stream of targets, one core",
                    seconds["qpipe"],
                    rivals[name],
                    seconds[name],
                    positions,
                    "positions",
                ),
                smaller("the same targets on disk", sizes["qpipe"], rivals[name], sizes[name]),
            )
        ]
    )
    if "litdata" not in ways:
        print("litdata is not installed: pip install -r requirements/bench.txt")


def size_of(folder: Path) -> int:
    """The bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def smaller(what: str, ours: float, beside: str, theirs: float) -> Figure:
    """How many times as small ours is, in bytes a position."""
    ratio = theirs / ours
    own, other = (f"{size:.0f} bytes/position" for size in (ours, theirs))
    return Figure(what, own, f"{beside}: {other}", ratio, ratio, ratio)


def drain(rows: Iterable[dict[str, Any]]) -> int:
    """The supervised positions of all batches that the rows make."""
    return sum(padded_batch(batch).tokens for batch in cut(map(as_example, rows)))


def cut(examples: Iterable[TargetExample]) -> Iterator[list[TargetExample]]:
    """Examples in batches of at most `BATCH_TOKENS` tokens with their padding."""
    batch: list[TargetExample] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.input_ids))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(example.input_ids)
        batch.append(example)
    if batch:
        yield batch


def as_example(row: dict[str, Any]) -> TargetExample:
    """A row of another package as a record."""
    ints = {name: np.asarray(row[name], np.int32) for name in _INTS}
    floats = {name: np.asarray(row[name], np.float32) for name in _FLOATS}
    fields: dict[str, Any] = {"id": row["id"], **ints, **floats}
    return TargetExample(**fields)


def make_parquet(targets: Path, folder: Path) -> None:
    """The decoded rows as parquet files with plain list columns."""
    if folder.exists():
        return
    folder.mkdir()
    rows = TargetDataset(targets)
    types = {"id": pa.string()}
    types |= {name: pa.list_(pa.int32()) for name in _INTS}
    types |= {name: pa.list_(pa.float32()) for name in _FLOATS}
    for start in range(0, len(rows), _FILE_ROWS):
        some = rows.__getitems__(range(start, min(start + _FILE_ROWS, len(rows))))
        columns = {name: pa.array([row[name] for row in some], of) for name, of in types.items()}
        pq.write_table(
            pa.table(columns), folder / f"{start:07}.parquet", compression="zstd", row_group_size=64
        )


def rows_of_datasets(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows, shuffled in a buffer, as numpy arrays."""
    from datasets import load_dataset

    files = sorted(str(path) for path in folder.iterdir())
    rows: Any = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return iter(rows.shuffle(seed=0, buffer_size=1000).with_format("numpy"))


def make_chunks(stream: TargetStream, folder: Path) -> None:
    """The decoded rows in litdata's own form: a dict of arrays each."""
    if folder.exists():
        return
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    names = ("id", *_INTS, *_FLOATS)
    for index, example in enumerate(stream.in_order()):
        writer[index] = {name: getattr(example, name) for name in names}
    writer.done()
    writer.merge()


def rows_of_litdata(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows, shuffled within chunks."""
    from litdata import StreamingDataset

    return iter(StreamingDataset(str(folder), shuffle=True, seed=0))


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    chosen.mkdir(parents=True, exist_ok=True)
    main(chosen)
