"""Score folders made by hand from distributions that are known in full."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.manifest import Manifest
from qpipe.pipeline.folders.shard_run import StageResult
from qpipe.pipeline.format.records import Reject, ScoredExample, TargetExample
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choices, choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.tests.support.examples import dense_scored
from qpipe.tests.support.folders import in_shards, seal_shards
from qpipe.tests.support.tiers import of_six_kinds

Floats = NDArray[np.float64]
VOCAB = 24
TOP_K = 20
SFT_KL = choose("sft+kl")
ALL_CHOICES = list(choices())
every_choice = pytest.mark.parametrize(
    "choice",
    of_six_kinds(ALL_CHOICES, lambda each: (each.method.name, each.form)),
    ids=[f"{each.method.name} {each.form}" for each in ALL_CHOICES],
)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A demonstration under a model known in full."""

    name: str
    input_ids: list[int]  # [T]
    positions: list[int]  # [N]
    log_probs: Floats  # [N, V]
    weights: list[float]  # [N]

    @property
    def observed(self) -> list[int]:
        return [self.input_ids[position] for position in self.positions]

    def scored(self, top_k: int) -> ScoredExample:
        """The example as a scorer stores it."""
        return dense_scored(
            self.name, self.input_ids, self.positions, self.log_probs, top_k, self.weights
        )

    def under_teacher(self, noise: float = 1.0) -> "Dense":
        """The same demonstration under a model that is not quite the same."""
        rng = np.random.default_rng(len(self.positions) + 100)
        change = noise * rng.standard_normal(self.log_probs.shape)
        return replace(self, log_probs=log_softmax(self.log_probs + change))


def log_softmax(logits: Floats) -> Floats:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def random_dense(number: int, vocab_size: int = VOCAB, weighted: bool = False) -> Dense:
    """Demonstration `number`, of as many positions; weights of 0, 0.5 and 1 where it is weighted"""
    rng = np.random.default_rng(number)
    tokens = number + 3
    weights = rng.choice([0.0, 0.5, 1.0], number).tolist() if weighted else [1.0] * number
    return Dense(
        name=f"chats:{number}",
        input_ids=rng.integers(0, vocab_size, tokens).tolist(),
        positions=sorted(rng.choice(np.arange(1, tokens), number, replace=False).tolist()),
        log_probs=log_softmax(1.5 * rng.standard_normal((number, vocab_size))),
        weights=weights,
    )


def weighted(rows: Sequence[ScoredExample]) -> dict[str, float]:
    """How many weights are not 1, as `score` counts them."""
    return {"weighted": sum(int((row.token_weights != 1).sum()) for row in rows)}


def one_position(name: str, probs: Sequence[float], observed: int) -> Dense:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([probs], np.float64))
    return Dense(name, [0, observed], [1], log_probs, [1.0])


def score_folder(
    folder: Path,
    demonstrations: Sequence[Dense],
    shard_size: int = 3,
    top_k: int = TOP_K,
    vocab_size: int = VOCAB,
    engine: str = "transformers",
) -> Path:
    """The demonstrations scored, and a reject."""
    scored = [each.scored(top_k) for each in demonstrations]
    settings = {
        "vocab_size": vocab_size,
        "tokenizer_hash": "3fa9",
        "top_k": top_k,
        "model": folder.name,
        "engine": engine,
        "shard_size": shard_size,
    }
    seal_shards(
        folder,
        "score",
        settings,
        in_shards(scored, shard_size),
        inputs={"chats.jsonl": "0123"},
        provenance={"model": folder.name},
        rejects=[Reject("chats.jsonl", 3, "empty")],
        sums_of=weighted,
    )
    return folder


@dataclass(frozen=True)
class Made:
    """Score folders of the same seven demonstrations, of 0 to 6 positions."""

    scores: Path
    teacher: Path
    demonstrations: list[Dense]

    def settings(self, out: Path, choice: Choice, **options: Any) -> BuildSettings:
        teacher = (self.teacher,) if choice.needs_teacher else ()
        return BuildSettings(
            self.scores, out, choice, **{"teacher": teacher, "precision": "float32"} | options
        )

    def build(self, out: Path, choice: Choice, **options: Any) -> StageResult:
        return build_targets(self.settings(out, choice, **options))


def made_in(root: Path, shard_size: int = 3, weighted: bool = True, **options: Any) -> Made:
    demonstrations = [random_dense(number, weighted=weighted) for number in range(7)]
    taught = [each.under_teacher() for each in demonstrations]
    root.mkdir(exist_ok=True)
    return Made(
        score_folder(root / "scores", demonstrations, shard_size, **options),
        score_folder(root / "teacher", taught, shard_size, **options),
        demonstrations,
    )


def build(scores: Path, out: Path, method: str = "gift", **options: Any) -> StageResult:
    return build_targets(
        BuildSettings(scores, out, choose(method), **{"precision": "float32"} | options)
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def as_bytes(record: Any) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value if name == "id" else value.tobytes() for name, value in values.items()}


def examples_in(folder: Path) -> list[dict[str, Any]]:
    return [as_bytes(example) for example in read_targets(folder)]


def by_position(counts: NDArray[Any], values: NDArray[Any]) -> list[list[Any]]:
    ends = np.cumsum(counts)
    return [values[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def supports_of(example: TargetExample) -> list[dict[int, float]]:
    """Each position's support as token: probability."""
    ids = by_position(example.counts, example.support_ids)
    probs = by_position(example.counts, example.support_probs)
    return [dict(zip(*pair, strict=True)) for pair in zip(ids, probs, strict=True)]


def proportional(values: Floats) -> Floats:
    return values / values.sum()


def flat_weights(made: Made) -> list[float]:
    return [weight for dense in made.demonstrations for weight in dense.weights]


def parameters(manifest: Manifest) -> dict[str, float]:
    return manifest.settings["parameters"]
