"""`build-targets`: folders of scores to folders of targets, by every method and in every form."""

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.choice import Choice
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.manifest import Identity, Manifest, identity_schema, read_manifest
from qpipe.pipeline.methods import choices, choose
from qpipe.pipeline.records import Reject, ScoredExample, TargetExample
from qpipe.pipeline.runner import Job, ShardRun, StageResult, open_folder
from qpipe.pipeline.schema import schema_of
from qpipe.pipeline.shards import ShardContent, batches_of
from qpipe.pipeline.storage import sha256_of_json
from qpipe.stages import build_targets as stage
from qpipe.stages import teacher as teacher_module
from qpipe.stages.build_targets import BuildSettings, build_targets
from qpipe.stages.cli import main

Floats = NDArray[np.float64]
VOCAB = 24
TOP_K = 20
SFT_KL = choose("sft+kl")
ALL_CHOICES = list(choices())
every_choice = pytest.mark.parametrize(
    "choice", ALL_CHOICES, ids=[f"{each.method.name} {each.form}" for each in ALL_CHOICES]
)


# Folders made by hand


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
        """The example as a scorer stores it: each position's top k and what is outside it."""
        order = np.argsort(-self.log_probs, axis=1, kind="stable")
        top = order[:, :top_k]
        rest = np.take_along_axis(self.log_probs, order[:, top_k:], axis=1)
        columns = np.array(self.observed, np.int64)[:, None]
        observed = np.take_along_axis(self.log_probs, columns, axis=1)
        top_log_probs = np.take_along_axis(self.log_probs, top, axis=1)
        return ScoredExample(
            id=self.name,
            input_ids=np.array(self.input_ids, np.int32),
            positions=np.array(self.positions, np.int32),
            observed_log_probs=observed[:, 0].astype(np.float32),
            observed_ranks=(self.log_probs >= observed).sum(axis=1).astype(np.int32),
            counts=np.full(len(top), top.shape[1], np.int32),
            topk_ids=top.ravel().astype(np.int32),
            topk_log_probs=top_log_probs.ravel().astype(np.float32),
            tail_mass=np.exp(rest).sum(axis=1).astype(np.float32),
            token_weights=np.array(self.weights, np.float32),
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
    schema = schema_of("score", vocab_size)
    scored = [each.scored(top_k) for each in demonstrations]
    identity = Identity(
        stage="score",
        settings={
            "vocab_size": vocab_size,
            "tokenizer_hash": "3fa9",
            "top_k": top_k,
            "model": folder.name,
            "engine": engine,
            "shard_size": shard_size,
        },
        inputs={"chats.jsonl": "0123"},
        schema=identity_schema(schema),
    )

    def content(start: int) -> ShardContent:
        rows = scored[start : start + shard_size]
        made = ShardContent(batches_of(schema, rows))
        made.add_sums(weighted=sum(int((row.token_weights != 1).sum()) for row in rows))
        if start == 0:
            made.rejects.append(Reject("chats.jsonl", 3, "empty"))
        return made

    assert open_folder(folder, identity) is None
    run = ShardRun(Job(folder, schema, identity, {}, {"model": folder.name}))
    starts = range(0, len(scored), shard_size)
    for _ in run.shards((index, partial(content, start)) for index, start in enumerate(starts)):
        pass
    run.seal()
    return folder


@dataclass(frozen=True)
class Made:
    """Score folders of the same seven demonstrations, of 0 to 6 positions."""

    scores: Path
    teacher: Path
    demonstrations: list[Dense]

    def settings(self, out: Path, choice: Choice, **options: Any) -> BuildSettings:
        teacher = self.teacher if choice.needs_teacher else None
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


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut is no matter here, and waiting for the disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """In three shards, with token weights. Not to be changed."""
    return made_in(tmp_path_factory.mktemp("made"))


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of its own for a test."""
    return made_in(tmp_path / "own").scores


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


# What every method stores

OBSERVED, BASE = "observed", "base"
STORED = {
    "sft": {"frozen-target": OBSERVED, "frozen-weight": OBSERVED, "live": OBSERVED},
    "dft": {"frozen-target": BASE, "frozen-weight": OBSERVED, "live": OBSERVED},
    "beyond-log": {"frozen-target": BASE, "frozen-weight": OBSERVED, "live": OBSERVED},
    "profit": {"frozen-target": BASE, "frozen-weight": OBSERVED, "live": OBSERVED},
    "eaft": {"frozen-target": BASE, "frozen-weight": OBSERVED, "live": OBSERVED},
    "iw-sft": {"live": "base-observed"},
    "cft": {"frozen-weight": OBSERVED, "frozen-target": BASE, "live": OBSERVED},
    "label-smoothing": {"frozen-target": "uniform", "live": "uniform"},
    "sft+kl": {"frozen-target": BASE, "live": BASE},
    "asft": {"frozen-target": BASE, "live": BASE},
    "psft": {"live": "base-observed"},
    "gem": {"live": OBSERVED},
    "kd": {"frozen-target": "teacher", "live": "teacher"},
    "kd-hybrid": {"frozen-target": "teacher", "live": "teacher"},
    "target-sft": {"frozen-target": "mixture", "live": "teacher"},
    "gift": {"frozen-target": BASE, "live": BASE},
    "flow": {"frozen-weight": OBSERVED, "frozen-target": BASE, "live": OBSERVED},
    "stm": {"frozen-weight": OBSERVED, "frozen-target": BASE, "live": OBSERVED},
    "token-cleaning": {"frozen-weight": OBSERVED, "frozen-target": BASE, "live": OBSERVED},
    "contrast": {"frozen-target": "contrast", "live": "contrast"},
    "idft": {"live": OBSERVED},
    "trsft": {"live": OBSERVED},
}
WITH_TEACHER = {"kd", "kd-hybrid", "target-sft", "token-cleaning", "contrast"}


def test_every_method_and_form_is_known_here() -> None:
    known = {(name, form) for name, forms in STORED.items() for form in forms}
    assert {(choice.method.name, choice.form) for choice in ALL_CHOICES} == known


@every_choice
def test_the_manifest_says_what_the_targets_are_and_where_from(
    made: Made, tmp_path: Path, choice: Choice
) -> None:
    options = {"top_p": 0.9, "max_support": 8, "temperature": 1.25}
    if choice.method.name in WITH_TEACHER:
        options["teacher_temperature"] = 0.8
    result = made.build(tmp_path / "targets", choice, **options)
    manifest = read_manifest(tmp_path / "targets", "build-targets")

    assert result.manifest == manifest
    settings = dict(manifest.settings)
    found = settings.pop("parameters")
    given = {p.name: p.default for p in choice.method.parameters if p.default is not None}
    assert {name: found.pop(name) for name in given} == given
    statistics = {"flow": ["tau"], "token-cleaning": ["threshold"]}
    assert list(found) == statistics.get(choice.method.name, [])
    stored = STORED[choice.method.name][choice.form]
    is_cut = stored in ("base", "teacher", "mixture", "contrast")
    assert settings.pop("support_order") == sha256_of_json(manifest.frequent_ids)
    assert bool(manifest.frequent_ids) == is_cut
    assert settings == {
        "method": choice.method.name,
        "form": choice.form,
        "residual": stored,
        "tail_shape": "uniform" if choice.method.name == "label-smoothing" else "student",
        "top_p": 0.9 if is_cut else None,
        "max_support": 8 if is_cut else None,
        "precision": "float32",
        "temperature": 1.25,
        "teacher_temperature": 0.8 if choice.method.name in WITH_TEACHER else 1.0,
        "vocab_size": VOCAB,
        "tokenizer_hash": "3fa9",
    }
    sources = {"scores": read_manifest(made.scores)}
    if choice.method.name in WITH_TEACHER:
        sources["teacher"] = read_manifest(made.teacher)
        assert manifest.provenance["teacher"] == sources["teacher"].provenance
    assert manifest.identity.inputs == {name: each.fingerprint for name, each in sources.items()}
    assert manifest.parents.keys() == sources.keys()
    for name, source in sources.items():
        assert manifest.parents[name]["identity"]["settings"] == source.settings
    assert manifest.provenance["model"] == "scores"


@every_choice
def test_every_example_is_there_with_distributions_that_add_up(
    made: Made, tmp_path: Path, choice: Choice
) -> None:
    result = made.build(tmp_path / "targets", choice, top_p=0.9, max_support=4)

    read = list(read_targets(tmp_path / "targets"))
    assert [example.id for example in read] == [f"chats:{number}" for number in range(7)]
    for example, dense in zip(read, made.demonstrations, strict=True):
        assert example.input_ids.tolist() == dense.input_ids
        assert example.positions.tolist() == dense.positions
        supports = supports_of(example)
        assert len(supports) == len(example.trust) == len(example.weights) == len(dense.positions)
        for support, observed, tail in zip(
            supports, dense.observed, example.tail_mass, strict=True
        ):
            assert observed in support
            assert len(support) <= 4 + 1
            assert sum(support.values()) + tail == pytest.approx(1, abs=1e-6)
        values = [*example.trust, *example.support_probs, *example.tail_mass]
        assert all(0 <= value <= 1 for value in values)
        assert np.isfinite(example.weights).all()
        assert (example.weights >= 0).all()
    entries = sum(len(example.support_ids) for example in read)
    totals, of_scores = result.manifest.totals, read_manifest(made.scores).totals
    assert totals["entries"] == entries
    assert totals["rows"] == 7 == of_scores["rows"]
    assert totals["positions"] == result.positions == sum(range(7)) == of_scores["positions"]
    assert totals["tokens"] == sum(len(example.input_ids) for example in read)
    for name in ("trust", "tail_mass"):
        total = sum(float(getattr(example, name).sum()) for example in read)
        assert totals["sums"][name] == pytest.approx(total, rel=1e-6, abs=1e-9)


@every_choice
def test_a_second_build_does_nothing(made: Made, tmp_path: Path, choice: Choice) -> None:
    first = made.build(tmp_path / "targets", choice)
    before = times(tmp_path / "targets")
    second = made.build(tmp_path / "targets", choice)

    assert second.manifest == first.manifest
    assert (second.positions, second.seconds, second.was_done) == (0, 0.0, True)
    assert not first.was_done
    assert times(tmp_path / "targets") == before


@every_choice
def test_sharding_of_any_size_gives_the_same_examples(
    sharded: dict[int, Made], tmp_path: Path, choice: Choice
) -> None:
    found = {}
    for size, each in sharded.items():
        out = tmp_path / f"targets-{size}"
        manifest = each.build(out, choice, top_p=0.8).manifest
        assert len(manifest.shards) == math.ceil(7 / size)
        found[size] = (examples_in(out), manifest)

    examples, manifest = found[3]
    assert len(examples) == 7
    for other, its_manifest in found.values():
        assert other == examples
        assert its_manifest.settings == manifest.settings
        assert its_manifest.totals["sums"] == pytest.approx(manifest.totals["sums"], rel=1e-9)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    """The same demonstrations in shards of several sizes."""
    root = tmp_path_factory.mktemp("sharded")
    return {size: made_in(root / str(size), size) for size in (1, 3, 100)}


@every_choice
def test_a_stopped_build_goes_on_and_gives_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice
) -> None:
    stop_and_go_on(made, tmp_path, monkeypatch, choice, stopped_at=1)


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_a_build_may_be_stopped_at_any_shard(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    stop_and_go_on(made, tmp_path, monkeypatch, choose("gift"), stopped_at)


def stop_and_go_on(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice, stopped_at: int
) -> None:
    calls: list[int] = []
    targets_of = stage.targets_of

    def counted(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 == stopped_at:
            raise KeyboardInterrupt
        return targets_of(*arguments)

    made.build(tmp_path / "undisturbed", choice)
    monkeypatch.setattr(stage, "targets_of", counted)
    with pytest.raises(KeyboardInterrupt):
        made.build(tmp_path / "targets", choice)
    with pytest.raises(UserError, match="not finished yet: run `qpipe build-targets`"):
        read_manifest(tmp_path / "targets")
    result = made.build(tmp_path / "targets", choice)

    assert len(calls) == 3 + 1  # three shards of a batch each, one of them begun twice
    assert result.positions == sum([3, 12, 6][stopped_at:])
    assert folder_bytes(tmp_path / "targets") == folder_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("choice", [choose("gift"), choose("target-sft"), choose("flow")])
def test_pieces_of_any_size_give_the_same_examples(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice
) -> None:
    whole = made.build(tmp_path / "whole", choice).manifest
    monkeypatch.setattr(teacher_module, "PIECE_POSITIONS", 4)
    cut = made.build(tmp_path / "cut", choice).manifest

    assert examples_in(tmp_path / "cut") == examples_in(tmp_path / "whole")
    assert cut.settings == whole.settings
    assert cut.totals["sums"] == pytest.approx(whole.totals["sums"], rel=1e-9)


def test_a_shard_of_rejects_alone_stays_a_shard(tmp_path: Path) -> None:
    schema = schema_of("score", VOCAB)
    found = [random_dense(number).scored(TOP_K) for number in (2, 3)]
    settings = {"vocab_size": VOCAB, "tokenizer_hash": "3fa9", "top_k": TOP_K}
    identity = Identity("score", settings, {}, identity_schema(schema))
    open_folder(tmp_path / "scores", identity)
    run = ShardRun(Job(tmp_path / "scores", schema, identity, {}, {}))
    contents = [ShardContent(batches_of(schema, rows)) for rows in ([], found, [])]
    for _ in run.shards((index, lambda made=made: made) for index, made in enumerate(contents)):
        pass
    run.seal()

    for method in ("sft+kl", "flow", "kd"):
        teacher = tmp_path / "scores" if method == "kd" else None
        result = build(tmp_path / "scores", tmp_path / method, method, teacher=teacher)
        assert [shard.rows for shard in result.manifest.shards] == [0, 2, 0]
        assert [each.id for each in read_targets(tmp_path / method)] == ["chats:2", "chats:3"]


# Content, worked out over the whole vocabulary


@dataclass(frozen=True)
class Known:
    """Everything about a position, known in full."""

    base: Floats  # [V]
    teacher: Floats  # [V]
    observed: int
    weight: float  # that came with the demonstration

    @property
    def base_y(self) -> float:
        return float(self.base[self.observed])

    @property
    def teacher_y(self) -> float:
        return float(self.teacher[self.observed])

    @property
    def one_hot(self) -> Floats:
        return np.eye(len(self.base))[self.observed]


Worked = tuple[float, float, Floats]  # trust, weight and residual
ANSWERS: dict[str, tuple[Choice, Callable[[Known], Worked]]] = {
    "sft": (choose("sft"), lambda k: (1, 1, k.one_hot)),
    "dft frozen-target": (choose("dft"), lambda k: (k.base_y, 1, k.base)),
    "dft frozen-weight": (choose("dft", "frozen-weight"), lambda k: (1, k.base_y, k.one_hot)),
    "dft live": (choose("dft", "live"), lambda k: (1, 1, k.one_hot)),
    "beyond-log": (choose("beyond-log", given={"alpha": 3}), lambda k: (k.base_y**3, 1, k.base)),
    "profit": (
        choose("profit", "frozen-weight", {"tau": 0.02}),
        lambda k: (1, k.base_y >= 0.02, k.one_hot),
    ),
    "eaft": (
        choose("eaft", given={"a": 0.5}),
        lambda k: ((top_20_entropy(k.base) / 3) ** 0.5, 1, k.base),
    ),
    "label-smoothing": (
        choose("label-smoothing", given={"lam": 0.25}),
        lambda k: (0.75, 1, np.full(VOCAB, 1 / VOCAB)),
    ),
    "sft+kl": (choose("sft+kl", given={"lam": 0.25}), lambda k: (0.8, 1.25, k.base)),
    "asft": (
        choose("asft", given={"lam": 0.2}),
        lambda k: (k.base_y / (k.base_y + 0.2), k.base_y + 0.2, k.base),
    ),
    "asft live": (choose("asft", "live"), lambda k: (1, 1, k.base)),
    "iw-sft": (choose("iw-sft"), lambda k: (1, 1, k.base)),
    "psft": (choose("psft"), lambda k: (1, 1, k.base)),
    "kd": (choose("kd"), lambda k: (0, 1, k.teacher)),
    "kd-hybrid": (choose("kd-hybrid", given={"lam": 0.3}), lambda k: (0.7, 1, k.teacher)),
    "target-sft": (
        choose("target-sft", given={"eta": 0.3}),
        lambda k: (k.base_y, 1, proportional(k.base**0.7 * k.teacher**0.3)),
    ),
    "target-sft live": (choose("target-sft", "live"), lambda k: (1, 1, k.teacher)),
    "gift": (
        choose("gift", given={"beta": 2}),
        lambda k: (1 - 1 / (1 + k.base_y * (math.e**2 - 1)), 1, k.base),
    ),
    "flow": (choose("flow", given={"tau": 2}), lambda k: (1, math.sqrt(k.base_y), k.one_hot)),
    "flow frozen-target": (
        choose("flow", "frozen-target", {"tau": 2}),
        lambda k: (math.sqrt(k.base_y), 1, k.base),
    ),
    "stm": (choose("stm", given={"tau": 0.02}), lambda k: (1, k.base_y >= 0.02, k.one_hot)),
    "token-cleaning": (
        choose("token-cleaning", given={"threshold": 0.1}),
        lambda k: (1, math.log(k.teacher_y / k.base_y) >= 0.1, k.one_hot),
    ),
    "contrast": (
        choose("contrast", given={"alpha": 0.3, "beta": 0.45}),
        lambda k: (
            0,
            float((k.teacher * np.log(k.teacher / k.base)).sum()) >= 0.45,
            proportional(
                np.where(k.teacher >= 0.3 * k.teacher.max(), k.teacher / k.base, 0.0),
            ),
        ),
    ),
    # a mask is γ, and no factor besides
    "cft": (choose("cft"), lambda k: (1, k.weight, k.one_hot)),
    "cft frozen-target": (choose("cft", "frozen-target"), lambda k: (k.weight, 1, k.base)),
}
OBSERVED_ALONE = {"label-smoothing", "iw-sft", "psft"}  # of a residual that is not one-hot


def proportional(values: Floats) -> Floats:
    return values / values.sum()


def top_20_entropy(probs: Floats) -> float:
    top = proportional(np.sort(probs)[-20:])
    return float(-(top * np.log(top)).sum())


@pytest.mark.parametrize("name", ANSWERS)
def test_targets_are_those_worked_out_over_the_whole_vocabulary(
    whole: Made, tmp_path: Path, name: str
) -> None:
    choice, answer = ANSWERS[name]
    whole.build(tmp_path / "targets", choice, top_p=1.0)

    seen = []
    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        taught = dense.under_teacher()
        for n, support in enumerate(supports_of(example)):
            known = Known(
                np.exp(dense.log_probs[n]),
                np.exp(taught.log_probs[n]),
                dense.observed[n],
                dense.weights[n],
            )
            trust, weight, residual = answer(known)
            if choice.method.name != "cft":
                weight *= known.weight
            alone = {} if name in OBSERVED_ALONE else {*np.flatnonzero(residual).tolist()}
            assert support.keys() == {known.observed, *alone}
            stored = residual[list(support)]
            np.testing.assert_allclose(list(support.values()), stored, rtol=2e-6)
            assert example.tail_mass[n] == pytest.approx(1 - stored.sum(), abs=1e-6)
            assert example.trust[n] == pytest.approx(trust, rel=2e-6)
            assert example.weights[n] == pytest.approx(weight, rel=2e-6)
            seen.append((float(trust), float(weight)))
    assert len(seen) == sum(range(7))
    assert len(set(seen)) > 1
    # no threshold has all tokens on one side
    indicators = {"profit", "stm", "token-cleaning", "contrast"}
    if choice.method.name in indicators:
        full = [w for (_, w), k in zip(seen, flat_weights(whole), strict=True) if k > 0]
        assert 0 < sum(weight > 0 for weight in full) < len(full)


def flat_weights(made: Made) -> list[float]:
    return [weight for dense in made.demonstrations for weight in dense.weights]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Scores of the whole vocabulary."""
    return made_in(tmp_path_factory.mktemp("whole"), top_k=VOCAB)


def test_truncation_is_as_it_was_asked_for(whole: Made, tmp_path: Path) -> None:
    whole.build(tmp_path / "targets", SFT_KL, top_p=0.6, max_support=5)

    sizes = set()
    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        for n, (support, observed) in enumerate(
            zip(supports_of(example), dense.observed, strict=True)
        ):
            order = np.argsort(-dense.log_probs[n])
            held = np.cumsum(np.exp(dense.log_probs[n][order]))
            size = min(int((held < 0.6).sum()) + 1, 5)
            assert support.keys() == {*order[:size].tolist(), observed}
            sizes.add(size)
    assert {*range(2, 6)} <= sizes


def test_temperatures_are_those_of_their_model(whole: Made, tmp_path: Path) -> None:
    made = whole.build(
        tmp_path / "targets", choose("target-sft"), top_p=1.0, temperature=2.0,
        teacher_temperature=0.5,
    )  # fmt: skip

    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        taught = dense.under_teacher()
        for n, support in enumerate(supports_of(example)):
            base = proportional(np.exp(dense.log_probs[n] / 2.0))
            mixed = proportional(np.sqrt(base) * np.exp(taught.log_probs[n] / 0.5) ** 0.5)
            np.testing.assert_allclose(list(support.values()), mixed[list(support)], rtol=5e-6)
            assert example.trust[n] == pytest.approx(base[dense.observed[n]], rel=5e-6)
    sums = made.manifest.totals["sums"]
    assert (sums["temperature_bound"], sums["teacher_temperature_bound"]) == (0, 0)  # no tail


def test_only_a_temperature_that_is_set_has_a_bound(made: Made, tmp_path: Path) -> None:
    def names(out: str, **options: Any) -> set[str]:
        sums = made.build(tmp_path / out, choose("kd"), **options).manifest.totals["sums"]
        return {name for name in sums if name.endswith("bound") and sums[name] > 0}

    assert names("a") == set()
    assert names("b", temperature=2.0) == {"temperature_bound"}
    assert names("c", teacher_temperature=2.0) == {"teacher_temperature_bound"}


# Parameters that the data set decides


def numbers_of(made: Made) -> tuple[Floats, Floats]:
    """The loss of the base and of the teacher at every position, as they are stored."""
    return tuple(
        -np.concatenate([example.observed_log_probs for example in read_scores(folder)]).astype(
            np.float64
        )
        for folder in (made.scores, made.teacher)
    )  # type: ignore[return-value]


def parameters(manifest: Manifest) -> dict[str, float]:
    return manifest.settings["parameters"]


@pytest.mark.parametrize("form", ["frozen-weight", "frozen-target", "live"])
@pytest.mark.parametrize("numbers", [range(7), range(6), range(1, 3)], ids=["21", "15", "3"])
def test_flow_takes_the_median_of_the_base_losses(
    tmp_path: Path, form: str, numbers: range
) -> None:
    dense = [random_dense(number) for number in numbers]
    even = dense[:-1] if sum(numbers) % 2 else dense[1:]
    for name, rows in (("odd", dense), ("other", even)):
        folder = score_folder(tmp_path / name, rows, shard_size=2)
        result = build_targets(
            BuildSettings(folder, tmp_path / f"{name}-targets", choose("flow", form))
        )
        losses = np.concatenate([row.observed_log_probs for row in read_scores(folder)])
        assert parameters(result.manifest) == {"tau": float(np.median(-losses.astype(np.float64)))}


def test_flow_of_an_even_number_takes_the_middle_of_two(tmp_path: Path) -> None:
    probs = [0.9, 0.5, 0.2, 0.1]
    dense = [one_position(str(p), [p, 1 - p], observed=0) for p in probs]
    folder = score_folder(tmp_path / "scores", dense, 1, top_k=2, vocab_size=2)

    manifest = build(folder, tmp_path / "targets", "flow").manifest

    tau = (math.log(2) + math.log(5)) / 2
    assert parameters(manifest)["tau"] == pytest.approx(tau, rel=1e-6)
    weights = [float(example.weights[0]) for example in read_targets(tmp_path / "targets")]
    assert weights == pytest.approx([p ** (1 / tau) for p in probs], rel=1e-5)


@pytest.mark.parametrize("keep", [0.6, 0.3, 1.0, 0.05])
def test_token_cleaning_keeps_the_tokens_of_the_highest_excess_loss(
    sharded: dict[int, Made], tmp_path: Path, keep: float
) -> None:
    found = set()
    for size, each in sharded.items():
        choice = choose("token-cleaning", given={"keep": keep})
        out = tmp_path / str(size)
        found.add(parameters(each.build(out, choice).manifest)["threshold"])
    base, teacher = numbers_of(sharded[3])
    excess = base - teacher
    wanted = int(len(excess) * keep)  # as the authors take them
    assert found == {float(np.sort(excess)[::-1][wanted - 1])}
    kept = np.concatenate([example.weights > 0 for example in read_targets(tmp_path / "3")])
    came_with = np.array(flat_weights(sharded[3]))
    highest = np.isin(np.arange(len(excess)), np.argsort(-excess)[:wanted])
    assert kept.tolist() == (highest & (came_with > 0)).tolist()


def test_token_cleaning_may_keep_nothing(made: Made, tmp_path: Path) -> None:
    made.build(tmp_path / "targets", choose("token-cleaning", given={"keep": 0}))

    weights = [weight for each in read_targets(tmp_path / "targets") for weight in each.weights]
    assert len(weights) == 21
    assert not any(weights)


def test_a_statistic_follows_the_temperature(whole: Made, tmp_path: Path) -> None:
    result = whole.build(tmp_path / "targets", choose("flow"), temperature=2.0)

    losses = [
        -math.log(proportional(np.exp(row / 2.0))[observed])
        for dense in whole.demonstrations
        for row, observed in zip(dense.log_probs, dense.observed, strict=True)
    ]
    assert parameters(result.manifest)["tau"] == pytest.approx(np.median(losses), rel=1e-6)


def test_a_parameter_that_is_given_is_not_looked_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise AssertionError("it was")

    monkeypatch.setattr(stage, "OrderStatistics", none)
    given = {"flow": {"tau": 0.75}, "token-cleaning": {"threshold": -0.5}}
    for method, values in given.items():
        manifest = made.build(tmp_path / method, choose(method, given=values)).manifest
        kept = {} if method == "flow" else {"keep": 0.6}
        assert parameters(manifest) == kept | values
    with pytest.raises(AssertionError, match="it was"):
        made.build(tmp_path / "sought", choose("flow"))


def test_flow_is_refused_where_the_median_is_0(tmp_path: Path) -> None:
    dense = [one_position(str(n), [1.0, 1e-9], observed=int(n == 4)) for n in range(5)]
    folder = score_folder(tmp_path / "scores", dense, 2, top_k=2, vocab_size=2)

    with pytest.raises(UserError, match=r"flow: tau=0 .*above 0.*--param tau=") as refused:
        build(folder, tmp_path / "targets", "flow")

    assert "\n" not in str(refused.value)
    assert not (tmp_path / "targets").exists()
    result = build_targets(
        BuildSettings(folder, tmp_path / "targets", choose("flow", given={"tau": 1}))
    )
    assert parameters(result.manifest) == {"tau": 1.0}


# What a method needs


def test_cft_needs_token_weights(tmp_path: Path) -> None:
    unweighted = made_in(tmp_path / "plain", weighted=False).scores
    for form in ("frozen-weight", "frozen-target", "live"):
        settings = BuildSettings(unweighted, tmp_path / "out", choose("cft", form))
        with pytest.raises(UserError, match=r"cft needs token weights, .*plain/scores carry none"):
            build_targets(settings)
    assert not (tmp_path / "out").exists()

    weighted = made_in(tmp_path / "weighted").scores
    result = build(weighted, tmp_path / "out", "cft")
    assert result.manifest.totals["rows"] == 7


def test_a_mask_above_1_is_refused_and_its_example_named(tmp_path: Path) -> None:
    dense = [random_dense(number) for number in range(7)]
    dense[4].weights[2] = 1.5
    folder = score_folder(tmp_path / "scores", dense)

    with pytest.raises(UserError, match=r"example chats:4: a token has the weight 1\.5"):
        build(folder, tmp_path / "targets", "cft")
    build(folder, tmp_path / "weighted", "sft")  # any other takes it as a factor
    weights = [each.weights for each in read_targets(tmp_path / "weighted")]
    assert weights[4].tolist() == [1, 1, 1.5, 1]


@pytest.mark.parametrize(("top_k", "vocab_size", "is_enough"), [(19, 24, False), (12, 12, True)])
def test_eaft_frozen_needs_the_20_most_probable_tokens(
    tmp_path: Path, top_k: int, vocab_size: int, is_enough: bool
) -> None:
    dense = [random_dense(number, vocab_size) for number in range(4)]
    folder = score_folder(tmp_path / "scores", dense, top_k=top_k, vocab_size=vocab_size)

    for form in ("frozen-target", "frozen-weight"):
        settings = BuildSettings(folder, tmp_path / form, choose("eaft", form))
        if is_enough:
            build_targets(settings)
            continue
        words = "eaft needs the 20 most probable tokens, .*scores holds 19: .*--top-k 20 or more"
        with pytest.raises(UserError, match=words):
            build_targets(settings)
        assert not (tmp_path / form).exists()
    # the trainer reads the student's own
    build_targets(BuildSettings(folder, tmp_path / "live", choose("eaft", "live")))


def test_a_teacher_that_is_missing_is_refused_with_the_way_to_one(
    made: Made, tmp_path: Path
) -> None:
    for choice in ALL_CHOICES:
        if choice.method.name in WITH_TEACHER:
            with pytest.raises(UserError, match=r"needs a teacher: score .* --at") as refused:
                build_targets(BuildSettings(made.scores, tmp_path / "out", choice))
            assert str(refused.value).startswith(choice.method.name)
    assert not (tmp_path / "out").exists()


def test_contrast_is_refused_where_the_base_is_not_known_at_the_teachers_head(
    tmp_path: Path,
) -> None:
    base = [0.5, 0.3, 0.15, 0.04, 0.01]
    apart = [0.1, 0.1, 0.1, 0.1, 0.6]
    pairs = [("a", 0, base), ("b", 4, apart), ("c", 0, base), ("d", 0, apart), ("e", 0, apart)]
    scores = score_folder(
        tmp_path / "scores", [one_position(name, base, y) for name, y, _ in pairs], 2,
        top_k=2, vocab_size=5,
    )  # fmt: skip
    teacher = score_folder(
        tmp_path / "teacher", [one_position(name, q, y) for name, y, q in pairs], 2,
        top_k=2, vocab_size=5,
    )  # fmt: skip

    # of b the base is known at 4, the observed token; of d it is not
    with pytest.raises(UserError, match="example d: the base's probability of a token") as refused:
        build(scores, tmp_path / "targets", "contrast", teacher=teacher)
    assert "score the base with `qpipe score --at` the teacher's folder" in str(refused.value)
    with pytest.raises(UserError, match="not finished yet"):
        read_manifest(tmp_path / "targets")


# Folders that do not fit


@pytest.mark.parametrize(
    ("choice", "options", "words"),
    [
        (choose("asft"), {}, 'settings.method is "dft" there and "asft" now'),
        (
            choose("dft", "frozen-weight"),
            {},
            'settings.form is "frozen-target" there and "frozen-weight" now',
        ),
        (choose("dft"), {"top_p": 0.9}, "settings.top_p is 0.99 there and 0.9 now"),
        (choose("dft"), {"max_support": 8}, "settings.max_support is 64 there and 8 now"),
        (choose("dft"), {"temperature": 2.0}, "settings.temperature is 1.0 there and 2.0 now"),
    ],
)
def test_a_folder_built_otherwise_is_refused_and_left_alone(
    made: Made, tmp_path: Path, choice: Choice, options: dict[str, Any], words: str
) -> None:
    made.build(tmp_path / "targets", choose("dft"))
    assert words in refusal(made, tmp_path / "targets", choice, **options)


def test_a_folder_built_with_other_parameters_or_another_teacher_is_refused(
    made: Made, tmp_path: Path
) -> None:
    choice = choose("kd-hybrid")
    made.build(tmp_path / "targets", choice)
    refused = partial(refusal, made, tmp_path / "targets")

    other = choose("kd-hybrid", given={"lam": 0.25})
    assert "settings.parameters.lam is 0.5 there and 0.25 now" in refused(other)
    assert "settings.teacher_temperature is 1.0 there and 2.0 now" in refused(
        choice, teacher_temperature=2.0
    )
    there, now = (read_manifest(each).fingerprint for each in (made.teacher, made.scores))
    words = f'inputs.teacher is "{there}" there and "{now}" now'
    assert words in refused(choice, teacher=made.scores)
    assert 'inputs.teacher is "' in refused(SFT_KL)


def refusal(made: Made, folder: Path, choice: Choice, **options: Any) -> str:
    """Why a build is refused, once it is sure that it changed nothing."""
    before = folder_bytes(folder)
    with pytest.raises(UserError, match="targets: already holds `qpipe build-targets`") as refused:
        made.build(folder, choice, **options)
    assert folder_bytes(folder) == before
    return str(refused.value)


def test_truncation_is_no_matter_to_targets_of_the_observed_token_alone(
    made: Made, tmp_path: Path
) -> None:
    for name in ("sft", "label-smoothing", "iw-sft"):
        made.build(tmp_path / name, choose(name), top_p=0.9)
        assert made.build(tmp_path / name, choose(name), max_support=3).was_done


def test_a_folder_built_from_other_scores_is_refused(scores: Path, tmp_path: Path) -> None:
    dense = [random_dense(number, weighted=True) for number in range(7)]
    other = score_folder(tmp_path / "others", dense, engine="vllm")
    build(scores, tmp_path / "targets")
    of_scores, of_other = read_manifest(scores).fingerprint, read_manifest(other).fingerprint

    with pytest.raises(UserError) as refused:
        build(other, tmp_path / "targets")

    assert f'inputs.scores is "{of_scores}" there and "{of_other}" now' in str(refused.value)


def test_scores_that_are_moved_are_the_same_scores(scores: Path, tmp_path: Path) -> None:
    build(scores, tmp_path / "targets")
    moved = scores.rename(tmp_path / "elsewhere")

    assert build(moved, tmp_path / "targets").was_done


def test_the_score_folder_itself_is_no_place_for_the_targets(scores: Path) -> None:
    before = folder_bytes(scores)

    with pytest.raises(UserError, match="already holds `qpipe score` output"):
        build(scores, scores)

    assert folder_bytes(scores) == before


def test_scores_that_cannot_be_read_are_refused_before_anything_is_made(
    scores: Path, tmp_path: Path
) -> None:
    build(scores, tmp_path / "targets")
    (tmp_path / "empty").mkdir()
    for folder, words in [
        (tmp_path / "gone", "gone: no such folder"),
        (tmp_path / "empty", "empty: not a qpipe folder"),
        (tmp_path / "targets", "made by `qpipe build-targets`, but the output of `qpipe score`"),
    ]:
        with pytest.raises(UserError, match=words):
            build(folder, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_unfinished_scores_are_refused(scores: Path, tmp_path: Path) -> None:
    manifest = read_manifest(scores)
    open_folder(tmp_path / "fresh", manifest.identity)

    with pytest.raises(UserError, match="fresh: not finished yet: run `qpipe score`"):
        build(tmp_path / "fresh", tmp_path / "out")


@pytest.mark.parametrize("method", ["gift", "flow"])
def test_a_damaged_score_shard_is_refused_by_name_and_nothing_is_sealed(
    scores: Path, tmp_path: Path, method: str
) -> None:
    path = scores / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(UserError, match=r"scores/shard-00001\.arrow: damaged"):
        build(scores, tmp_path / "targets", method)
    assert not (tmp_path / "targets" / "manifest.json").exists()


# The command


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def qpipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, in this process."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["qpipe", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, captured.out, captured.err)

    return run


def refused_line(ran: Ran) -> str:
    assert ran.status == 2, (ran.out, ran.err)
    assert ran.out == ""
    [line] = ran.err.splitlines()
    assert line.startswith("Error: ")
    return line


def test_the_default_is_sft_kl_and_with_a_teacher_target_sft(
    made: Made, tmp_path: Path, qpipe: Command
) -> None:
    for name, options, wanted in (
        ("alone", (), ("sft+kl", "frozen-target", {"lam": 0.1})),
        ("taught", ("--teacher", made.teacher), ("target-sft", "frozen-target", {"eta": 0.5})),
    ):
        command = ("build-targets", "--scores", made.scores, "--out", tmp_path / name, *options)
        ran = qpipe(*command)
        assert ran.status == 0, ran.err
        assert "nothing to do" not in ran.out
        settings = read_manifest(tmp_path / name, "build-targets").settings
        assert tuple(settings[key] for key in ("method", "form", "parameters")) == wanted
        assert (settings["top_p"], settings["max_support"]) == (0.99, 64)
        assert (settings["temperature"], settings["teacher_temperature"]) == (1.0, 1.0)
        again = qpipe(*command)
        assert (again.status, "nothing to do" in again.out) == (0, True)


def test_every_option_arrives(made: Made, tmp_path: Path, qpipe: Command) -> None:
    ran = qpipe(
        "build-targets", "--scores", made.scores, "--teacher", made.teacher, "--out",
        tmp_path / "targets", "--method", "target-sft", "--form", "live", "--param", "eta=0.25",
        "--top-p", 0.8, "--max-support", 7, "--temperature", 0.5, "--teacher-temperature", 2,
    )  # fmt: skip
    assert ran.status == 0, ran.err

    settings = read_manifest(tmp_path / "targets").settings
    assert (settings["form"], settings["parameters"]) == ("live", {"eta": 0.25})
    assert (settings["top_p"], settings["max_support"]) == (0.8, 7)
    assert (settings["temperature"], settings["teacher_temperature"]) == (0.5, 2.0)


def test_a_statistic_may_be_given(made: Made, tmp_path: Path, qpipe: Command) -> None:
    for method, param in (("flow", "tau=0.75"), ("token-cleaning", "threshold=-0.5")):
        teacher = ("--teacher", made.teacher) if method == "token-cleaning" else ()
        ran = qpipe(
            "build-targets", "--scores", made.scores, "--out", tmp_path / method,
            "--method", method, "--param", param, *teacher,
        )  # fmt: skip
        assert ran.status == 0, ran.err
        name, value = param.split("=")
        assert parameters(read_manifest(tmp_path / method))[name] == float(value)


NAN, INF = math.nan, math.inf
TOP_P = "give above 0, up to 1"
TEMPERATURE = "give 0.05 to 20"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *[(("--top-p", each), TOP_P) for each in (0, -0.1, 1.0000001, NAN, INF)],
        *[(("--max-support", each), "give 1 or more") for each in (0, -1)],
        *[(("--temperature", each), TEMPERATURE) for each in (0.0499, 20.01, 0, -1, NAN, INF)],
        *[
            (("--teacher", "T", "--teacher-temperature", each), TEMPERATURE)
            for each in (0.0499, 20.01, 0, NAN)
        ],
        (("--teacher-temperature", 2), "is of no use without --teacher"),
        (("--teacher", "T", "--method", "gift"), "T: gift reads no teacher"),
        (("--teacher", "T", "--method", "sft+kl", "--form", "live"), "sft+kl reads no teacher"),
        (("--method", "magic"), "'magic' is not known: choose one of sft, dft, "),
        (("--method", "gift", "--form", "frozen-weight"), "choose one of frozen-target, live"),
        (("--method", "gem", "--form", "frozen-target"), "the loss has no lower bound"),
        (("--param", "lam=-1"), "lam=-1 is out of range: give 0 to 1e+06"),
        (("--param", "lam=nan"), "lam=nan is out of range: give 0 to 1e+06"),
        (("--param", "lam=x"), "lam=x is no number: give 0 to 1e+06"),
        (("--param", "beta=1"), "no parameter 'beta': its parameters: lam"),
        (("--param", "lam=1", "lam=2"), "given twice"),
        (("--param", "lam"), "give a name and a value"),
        (("--method", "profit", "--param", "tau=0"), "give above 0, to 1"),
        (("--method", "flow", "--param", "tau=0"), "give above 0, to 1e+06"),
        (("--method", "gem", "--param", "h=x"), "h=x is not known: give one of linear, logsigmoid"),
    ],
    ids=lambda each: " ".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_what_cannot_be_is_refused_in_a_line_before_anything_is_read(
    tmp_path: Path, qpipe: Command, words: tuple[object, ...], said: str
) -> None:
    command = ("build-targets", "--scores", tmp_path / "missing", "--out", tmp_path / "out")
    line = refused_line(qpipe(*command, *words))

    assert said in line
    assert "missing" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.05, "teacher_temperature": 20, "top_p": 1e-9, "max_support": 1},
        {"temperature": 20, "teacher_temperature": 0.05, "top_p": 1.0, "max_support": 10**12},
    ],
)
def test_the_ends_of_every_range_are_allowed(
    made: Made, tmp_path: Path, options: dict[str, Any]
) -> None:
    made.build(tmp_path / "targets", choose("target-sft"), **options)

    for example in read_targets(tmp_path / "targets"):
        assert np.isfinite(example.support_probs).all()
        for support, tail in zip(supports_of(example), example.tail_mass, strict=True):
            assert sum(support.values()) + tail == pytest.approx(1, abs=1e-6)


def test_a_folder_that_is_not_there_is_refused_in_a_line(
    made: Made, tmp_path: Path, qpipe: Command
) -> None:
    command = ("build-targets", "--out", tmp_path / "out")
    gone = tmp_path / "gone"
    assert "gone: no such folder" in refused_line(qpipe(*command, "--scores", gone))
    line = refused_line(qpipe(*command, "--scores", made.scores, "--teacher", gone))
    assert re.search("gone: no such folder$", line)
    assert not (tmp_path / "out").exists()
