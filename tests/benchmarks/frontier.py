"""Bytes a token against what they are off by, for settings of build-targets, on real scores.

    python tests/benchmarks/frontier.py SCORES

SCORES is a score folder with a top k well above what is kept (128, say). Each row is a target
folder of `kd`-like residuals (all of the base's distribution, no observed token's share), its whole
size over its supervised tokens. Two errors, in the mean over the tokens:

- KL: of what is read from what was kept, support and tail, in nats: the codec's own error;
- gradient: the sum of absolute differences of the target, and so of the gradient with respect to
  the logits, from the one that all of the scores give, for a student that is flatter than the base
  (temperature 1.5) and has each tail in its own proportions: what is cut off counts as well. Also
  what it exceeds at one position in a hundred.

Beside them targets of fixed size, and ones sampled from the base (n draws, arXiv 2503.16870), which
are right in the mean over many draws only.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shards import ShardContent, commit_shard
from qpipe.pipeline.format.batches import FlatBatch, cut
from qpipe.pipeline.format.packing import Packing, Precision
from qpipe.pipeline.format.ragged import segment_sums
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods import choose
from qpipe.pipeline.targets.distributions import Supports, truncated
from qpipe.pipeline.targets.known import known_supports
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.commands.tables import print_table

SETTINGS: list[tuple[str, float, int, Precision]] = [
    *((f"mass {p:g}", p, 64, "uint8") for p in (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)),
    ("mass 0.99 of 128", 0.99, 128, "uint8"),
    ("mass 0.999 of 128", 0.999, 128, "uint8"),
    *((f"fixed k={k}", 1.0, k, "uint8") for k in (8, 16, 32, 64)),
    ("mass 0.99", 0.99, 64, "float16"),
    ("mass 0.99", 0.99, 64, "float32"),
    ("fixed k=64", 1.0, 64, "float32"),
]
TEMPERATURE = 1.5
SAMPLE = 1000  # positions of each of two batches that errors are measured at, densely


@dataclass(frozen=True)
class Whole:
    """All that the scores know, as [N, V] with one more column for the tail."""

    base: NDArray[np.float32]
    student: NDArray[np.float32]


def main(scores: Path) -> None:
    """Print the table."""
    folder = open_sealed(scores, "score")
    manifest = folder.manifest
    batches = [batch for shard in folder.shards for batch in folder.batches(shard)]
    batches = [next(cut(folder.schema, batch, SAMPLE)) for batch in batches[:2]]
    whole = [whole_of(batch, manifest.settings["vocab_size"]) for batch in batches]
    positions = manifest.totals["positions"]
    heads = (
        "setting",
        "precision",
        "entries",
        "bytes a token",
        "kept",
        "KL",
        "gradient",
        "worst 1 %",
    )
    rows = [heads]
    with tempfile.TemporaryDirectory() as made:
        for index, (name, top_p, most, precision) in enumerate(SETTINGS):
            out = Path(made) / str(index)
            _build(scores, out, top_p, most, precision)
            rows.append((name, precision, *_measured(out, batches, whole, top_p, most, positions)))
        for draws in (12, 50):
            out = Path(made) / f"sampled{draws}"
            rows.append((f"{draws} draws", "counts", *_sampled(out, batches, whole, draws)))
    print_table(rows)


def _build(scores: Path, out: Path, top_p: float, most: int, precision: Precision) -> None:
    choice = choose("sft+kl", "frozen-target")
    kept = {"top_p": top_p, "max_support": most, "precision": precision}
    build_targets(BuildSettings(scores, out, choice, **kept))


def whole_of(batch: FlatBatch, vocab_size: int) -> Whole:
    known = known_supports(batch)
    base = np.zeros((len(known.counts), vocab_size + 1), np.float32)
    base[known.position_of, known.ids] = known.probs
    base[:, -1] = known.tail_mass
    flat = base ** (1 / TEMPERATURE)
    return Whole(base, flat / flat.sum(1, keepdims=True))


def _measured(
    out: Path,
    batches: list[FlatBatch],
    whole: list[Whole],
    top_p: float,
    most: int,
    positions: int,
) -> tuple[str, ...]:
    """Entries, bytes, kept mass, KL and gradient errors of a folder."""
    folder = open_sealed(out)
    manifest = folder.manifest
    size = sum(path.stat().st_size for path in out.iterdir())
    whole_batches = [batch for shard in folder.shards for batch in folder.batches(shard)]
    read = [next(cut(folder.schema, b, SAMPLE)) for b in whole_batches[: len(batches)]]
    seen = sum(len(batch["positions"]) for batch in read)
    divergence, found = 0.0, []
    for scores, batch, known in zip(batches, read, whole, strict=True):
        kept = truncated(known_supports(scores), scores.observed_ids, top_p, most)
        divergence += _divergence(kept, batch)
        found.append(errors(batch["counts"], batch["support_ids"], batch["support_probs"], known))
    return (
        f"{manifest.totals['entries'] / positions:.1f}",
        f"{size / positions:.1f}",
        f"{1 - manifest.totals['sums']['tail_mass'] / positions:.4f}",
        f"{divergence / seen:.1e}",
        *mean_and_worst(found),
    )


def _divergence(kept: Supports, batch: FlatBatch) -> float:
    """KL of what is read from what was kept, added up."""
    order = np.lexsort((kept.ids, kept.position_of))
    position_of = np.repeat(np.arange(len(batch["counts"])), batch["counts"])
    same = np.lexsort((batch["support_ids"], position_of))
    assert np.array_equal(kept.ids[order], batch["support_ids"][same])
    wanted, found = kept.probs[order], batch["support_probs"][same].astype(np.float64)
    tail, found_tail = kept.tail_mass, batch["tail_mass"].astype(np.float64)
    has_tail = tail > 1e-30
    terms = wanted * np.log(np.maximum(wanted, 1e-300) / np.maximum(found, 1e-300))
    tails = tail[has_tail] * np.log(tail[has_tail] / found_tail[has_tail])
    return float(terms.sum() + tails.sum())


def errors(
    counts: NDArray[np.int32], ids: NDArray[np.int32], probs: NDArray[np.float32], known: Whole
) -> NDArray[np.float32]:
    """Sums [N] of absolute differences of the target, its tail spread as the student's."""
    position_of = np.repeat(np.arange(len(counts)), counts)
    target = known.student.copy()
    target[position_of, ids] = 0
    outside = target.sum(1, keepdims=True)
    tail = np.maximum(1 - segment_sums(probs.astype(np.float64), counts), 0)[:, None]
    target *= np.where(outside > 0, tail / np.maximum(outside, 1e-30), 0)
    target[position_of, ids] = probs
    return np.abs(target - known.base).sum(1)


def mean_and_worst(errors: list[NDArray[np.float32]]) -> tuple[str, str]:
    """The mean of errors, and what one in a hundred exceeds."""
    every = np.concatenate(errors)
    return f"{every.mean():.4f}", f"{np.quantile(every, 0.99):.3f}"


def _sampled(
    out: Path, batches: list[FlatBatch], whole: list[Whole], draws: int
) -> tuple[str, ...]:
    """The same of targets that are n draws from the base."""
    rng = np.random.default_rng(0)
    vocab_size = whole[0].base.shape[1] - 1
    schema = schema_of("build-targets", vocab_size, Packing("uint8", vocab_size, 255))
    content, found = ShardContent(), []
    for scores, known in zip(batches, whole, strict=True):
        base = known.base[:, :-1].astype(np.float64)
        times = rng.multinomial(draws, base / base.sum(1, keepdims=True))
        position_of, ids = np.nonzero(times)
        counts = np.bincount(position_of, minlength=len(base)).astype(np.int32)
        probs = (times[position_of, ids] / draws).astype(np.float32)
        ones = np.ones(len(base), np.float32)
        arrays = {
            **{name: scores[name] for name in ("input_ids", "positions")},
            **{"counts": counts, "support_ids": ids.astype(np.int32), "support_probs": probs},
            **{"trust": 0 * ones, "tail_mass": 0 * ones, "weights": ones},
        }
        entries = segment_sums(counts.astype(np.int64), scores.lengths["position"])
        content.batches.append(FlatBatch(scores.ids, arrays, scores.lengths | {"entry": entries}))
        found.append(errors(counts, arrays["support_ids"], probs, known))
    out.mkdir()
    entry = commit_shard(out, 0, schema, "", content)
    size, positions = entry.bytes, entry.positions
    return (
        f"{entry.entries / positions:.1f}",
        f"{size / positions:.1f}",
        "-",
        "-",
        *mean_and_worst(found),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
