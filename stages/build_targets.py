"""`qpipe build-targets`: score shards in, target shards out, one for one.

N supervised positions in a batch, K entries of their top k end to end.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..pipeline.codec import FlatBatch, segment_sums
from ..pipeline.errors import UserError
from ..pipeline.manifest import Identity, Manifest, identity_schema, read_manifest
from ..pipeline.methods import Choice
from ..pipeline.progress import progress_bar
from ..pipeline.provenance import package_versions
from ..pipeline.runner import Job, ShardRun, StageResult, open_folder
from ..pipeline.schema import schema_of
from ..pipeline.shards import ShardContent, read_shard
from ..pipeline.storage import locked

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What to make of the scores.

    The support kept of a base residual is the smallest prefix of the top k that holds `top_p` of
    the probability, at most `max_support` entries, and the observed token.
    """

    scores: Path
    out: Path
    choice: Choice
    top_p: float = 0.99
    max_support: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g} is out of range: give above 0, up to 1")
        if self.max_support < 1:
            raise UserError(f"--max-support {self.max_support} is out of range: give 1 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Supports:
    """Ragged distributions: `counts[n]` entries at position n, the rest in its tail."""

    counts: NDArray[np.int64]  # [N]
    ids: NDArray[np.int32]  # [K]
    probs: Floats  # [K]
    tail_mass: Floats  # [N]


def build_targets(settings: BuildSettings) -> StageResult:
    """Make the target folder, or what is missing of it."""
    scores = read_manifest(settings.scores, "score")
    vocab_size = scores.settings["vocab_size"]
    schema = schema_of("build-targets", vocab_size)
    choice = settings.choice
    identity = Identity(
        stage="build-targets",
        settings={
            "method": choice.method.name,
            "form": choice.form,
            "parameters": choice.parameters,
            "residual": choice.residual,
            "tail_shape": "uniform" if choice.residual == "uniform" else "student",
            # these say nothing of a residual that is no prefix of the top k
            "top_p": float(settings.top_p) if choice.residual == "base" else None,
            "max_support": settings.max_support if choice.residual == "base" else None,
            "vocab_size": vocab_size,
            "tokenizer_hash": scores.settings["tokenizer_hash"],
        },
        inputs={"scores": scores.fingerprint},
        schema=identity_schema(schema),
    )
    job = Job(
        settings.out,
        schema,
        identity,
        parents={"scores": {"identity": asdict(scores.identity), "parents": scores.parents}},
        provenance=scores.provenance | {"build_versions": package_versions("qpipe", "pyarrow")},
    )
    with locked(settings.out):
        done = open_folder(settings.out, identity)
        return _run(settings, scores, job) if done is None else StageResult(done, was_done=True)


def _run(settings: BuildSettings, scores: Manifest, job: Job) -> StageResult:
    def task(index: int) -> Callable[[], ShardContent]:
        return lambda: _build_shard(settings, scores, index)

    run = ShardRun(job)
    tasks = ((index, task(index)) for index in range(len(scores.shards)))
    positions = scores.totals["positions"]
    with progress_bar(
        total=positions, desc="build-targets", unit="tok", unit_scale=True
    ) as progress:
        for entry in run.shards(tasks):
            progress.update(entry.positions)
    return run.seal()


def targets_of(
    scores: FlatBatch, choice: Choice, top_p: float, max_support: int, vocab_size: int
) -> FlatBatch:
    """The targets of a batch of scores."""
    trust, weights = choice.trust_and_weight(scores["observed_log_probs"])
    supports = _residual(scores, choice, top_p, max_support, vocab_size)
    arrays = {
        "input_ids": scores["input_ids"],
        "positions": scores["positions"],
        "trust": trust.astype(np.float32),
        "counts": supports.counts.astype(np.int32),
        "support_ids": supports.ids.astype(np.int32),
        "support_probs": supports.probs.astype(np.float32),
        "tail_mass": supports.tail_mass.astype(np.float32),
        "weights": weights.astype(np.float32),
    }
    entries = segment_sums(supports.counts, scores.lengths["position"])
    return FlatBatch(scores.ids, arrays, scores.lengths | {"entry": entries})


def base_supports(scores: FlatBatch, top_p: float, max_support: int) -> Supports:
    """The base prior on its smallest prefix of mass `top_p`, plus the observed token.

    The tail adds up what is left out, so it stays exact where 1 minus the kept mass would cancel;
    support and tail are then scaled to add up to 1.
    """
    counts = scores["counts"].astype(np.int64)
    probs = np.exp(scores["topk_log_probs"].astype(np.float64))
    ids = scores["topk_ids"]
    position_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(probs)) - starts[position_of]
    before_NK = np.zeros((len(counts), counts.max(initial=0) + 1))
    before_NK[position_of, rank + 1] = probs
    mass_before = np.cumsum(before_NK, axis=1)[position_of, rank]

    is_observed = ids == scores.observed_ids[position_of]
    keep = ((mass_before < top_p) | (top_p == 1)) & (rank < max_support) | is_observed
    outside = np.ones(len(counts), bool)
    outside[position_of[is_observed]] = False
    observed_probs = np.exp(scores["observed_log_probs"][outside].astype(np.float64))

    tail_mass = scores["tail_mass"].astype(np.float64)
    tail_mass[outside] = np.maximum(tail_mass[outside] - observed_probs, 0)
    tail_mass += np.bincount(position_of, np.where(keep, 0.0, probs), len(counts))

    kept_counts = np.bincount(position_of[keep], minlength=len(counts))
    kept_ends = np.cumsum(kept_counts)[outside]  # an observed token outside the top k comes last
    support_ids = np.insert(ids[keep], kept_ends, scores.observed_ids[outside])
    support_probs = np.insert(probs[keep], kept_ends, observed_probs)
    kept_counts = kept_counts + outside
    total = segment_sums(support_probs, kept_counts) + tail_mass
    return Supports(
        kept_counts, support_ids, support_probs / np.repeat(total, kept_counts), tail_mass / total
    )


def _residual(
    scores: FlatBatch, choice: Choice, top_p: float, max_support: int, vocab_size: int
) -> Supports:
    match choice.residual:
        case "base":
            return base_supports(scores, top_p, max_support)
        case "uniform":
            return _observed_only(scores, 1 / vocab_size)
        case "observed":
            return _observed_only(scores, 1.0)


def _observed_only(scores: FlatBatch, prob: float) -> Supports:
    """The observed token with probability `prob`, the rest in the tail."""
    observed = scores.observed_ids
    size = len(observed)
    return Supports(np.ones(size, np.int64), observed, np.full(size, prob), np.full(size, 1 - prob))


def _build_shard(settings: BuildSettings, scores: Manifest, index: int) -> ShardContent:
    content = ShardContent()
    vocab_size = scores.settings["vocab_size"]
    for batch in read_shard(settings.scores, scores, scores.shards[index]):
        targets = targets_of(
            batch, settings.choice, settings.top_p, settings.max_support, vocab_size
        )
        content.batches.append(targets)
        content.add_sums(
            trust=targets["trust"].sum(dtype=np.float64),
            tail_mass=targets["tail_mass"].sum(dtype=np.float64),
        )
    return content
