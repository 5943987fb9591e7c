"""Bytes a token of packed scores against what they are off by, on real scores.

    python tests/benchmarks/score_frontier.py SCORES

SCORES is a plain score folder with a top k well above 64 (128, say). Each row is a score folder of
the same examples, its whole size over its supervised tokens, and two errors in the mean:

- KL: of what is read from the same entries and tail in float32, in nats;
- gradient: of targets that are built from it (99 %, one byte), as in `frontier.py`; also what it
  exceeds at one position in a hundred.

The last line states how fast record batches are encoded on one core, beside plain ones.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pyarrow as pa
from qpipe.pipeline.folders.manifest import Identity, identity_schema
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import ShardContent, batches_of, compression
from qpipe.pipeline.format.arrow import encode
from qpipe.pipeline.format.batches import FlatBatch, cut, flatten
from qpipe.pipeline.format.ragged import segment_sums
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.schema import (
    FORMAT_VERSION,
    PACKED_SCORES_VERSION,
    Schema,
    packing_of,
    schema_of,
)
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.commands.tables import print_table
from qpipe.stages.score.stage import most_probable
from qpipe.tests.benchmarks.frontier import SAMPLE, Whole, errors, mean_and_worst, whole_of

SETTINGS: list[tuple[int, float, str | None]] = [
    (64, 1.0, None),
    (64, 1.0, "uint16"),
    (64, 0.999, "uint16"),
    (64, 0.995, "uint16"),
    (64, 0.99, "uint16"),
    (32, 1.0, "uint16"),
    (128, 1.0, "uint16"),
]


_HEAD = ("k", "--top-p", "precision", "entries", "bytes a token", "KL", "gradient", "worst 1 %")


def main(scores: Path) -> None:
    """Print the table."""
    source = open_sealed(scores, "score")
    examples: list[ScoredExample] = list(source.records())
    batch = next(cut(source.schema, flatten(source.schema, examples), SAMPLE))
    whole = whole_of(batch, source.settings["vocab_size"])
    rows = [
        ("k", "--top-p", "precision", "entries", "bytes a token", "KL", "gradient", "worst 1 %")
    ]
    with tempfile.TemporaryDirectory() as made:
        for number, (top_k, top_p, precision) in enumerate(SETTINGS):
            cut_ones = [most_probable(first(each, top_k), top_p) for each in examples]
            settings = source.settings | {"top_k": top_k, "precision": precision}
            folder = seal(Path(made) / f"{number}", settings, cut_ones)
            rows.append(
                (
                    f"{top_k}",
                    f"{top_p:g}",
                    precision or "float32",
                    *measured(folder, cut_ones),
                    *of_targets(folder, whole, len(batch["positions"])),
                )
            )
    print_table(rows)
    for precision in (None, "uint16"):
        settings = source.settings | {"precision": precision}
        schema = schema_of("score", source.settings["vocab_size"], packing_of("score", settings))
        flat = batches_of(schema, [first(each, 64) for each in examples])
        print(
            f"{precision or 'float32'}: {encoded_a_second(schema, flat):,.0f} positions/s encoded"
        )


def first(example: ScoredExample, top_k: int) -> ScoredExample:
    """The example with its first k entries."""
    counts = example.counts
    ranks = np.arange(len(example.topk_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep, probs = ranks < top_k, np.exp(example.topk_log_probs.astype(np.float64))
    dropped = segment_sums(np.where(keep, 0, probs), counts)
    return replace(
        example,
        counts=segment_sums(keep.astype(np.int32), counts),
        topk_ids=example.topk_ids[keep],
        topk_log_probs=example.topk_log_probs[keep],
        tail_mass=(example.tail_mass + dropped).astype(np.float32),
    )


def seal(folder: Path, settings: dict[str, Any], examples: Sequence[ScoredExample]) -> Path:
    """A score folder of one shard."""
    if settings["precision"] is None:
        settings = {name: value for name, value in settings.items() if name != "precision"}
    schema = schema_of("score", settings["vocab_size"], packing_of("score", settings))
    version = FORMAT_VERSION if schema.packing is None else PACKED_SCORES_VERSION
    identity = Identity("score", settings, {}, identity_schema(schema), version)
    open_folder(folder, identity)
    run = ShardRun(Job(folder, schema, identity, {}, {}))
    run.make([(0, lambda: ShardContent(batches_of(schema, examples), sums={"weighted": 0.0}))])
    run.seal()
    return folder


def measured(folder: Path, examples: Sequence[ScoredExample]) -> tuple[str, str, str]:
    """Entries and bytes a token, and the divergence from what was stored."""
    read: list[ScoredExample] = list(open_sealed(folder).records())
    positions = sum(len(each.positions) for each in read)
    entries = sum(len(each.topk_ids) for each in read)
    size = sum(path.stat().st_size for path in folder.iterdir())
    total = sum(divergence(*pair) for pair in zip(examples, read, strict=True))
    return f"{entries / positions:.1f}", f"{size / positions:.1f}", f"{total / positions:.1e}"


def divergence(wanted: ScoredExample, found: ScoredExample) -> float:
    """KL of what is read from what was stored, added up; ids must be the same."""
    assert np.array_equal(wanted.topk_ids, found.topk_ids)
    logs, tail = wanted.topk_log_probs.astype(float), wanted.tail_mass.astype(float)
    total = segment_sums(np.exp(logs), wanted.counts) + tail
    logs, tail = logs - np.repeat(np.log(total), wanted.counts), tail / total
    found_tail = np.maximum(found.tail_mass.astype(float), 1e-300)
    terms = np.exp(logs) * (logs - found.topk_log_probs)
    return float(terms.sum() + (tail * np.log(np.maximum(tail, 1e-300) / found_tail)).sum())


def of_targets(folder: Path, whole: Whole, positions: int) -> tuple[str, str]:
    """The errors of targets built from a folder."""
    out = folder.with_name(f"{folder.name}-targets")
    build_targets(BuildSettings(folder, out, choose("sft+kl", "frozen-target")))
    targets = open_sealed(out)
    batch: FlatBatch = flatten(targets.schema, list(chain(targets.records())))
    batch = next(cut(targets.schema, batch, SAMPLE))
    assert len(batch["positions"]) == positions
    found = errors(batch["counts"], batch["support_ids"], batch["support_probs"], whole)
    return mean_and_worst([found])


def encoded_a_second(schema: Schema, batches: Sequence[FlatBatch]) -> float:
    """Positions a second, of computing, from flat batches to the bytes of an Arrow file."""
    times = []
    for _ in range(7):
        start = process_time()
        for batch in batches:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, schema.arrow, options=compression(schema)) as writer:
                writer.write_batch(encode(schema, batch))
        times.append(process_time() - start)
    return sum(len(batch["positions"]) for batch in batches) / min(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
