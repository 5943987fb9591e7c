"""Demonstrations under models that are known in full, and their ceilings, token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from qpipe.pipeline.format.batches import flatten
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choices
from qpipe.pipeline.targets.build import Evidence, ScoreModel, Truncation, stored_residual
from qpipe.pipeline.targets.ceiling import (
    Ceiling,
    ceiling_sums,
)
from qpipe.tests.support.methods import DEFAULTS, FACTS, FORMULAS, Token, one_hot

VOCAB_SIZE = 30
WHOLE = Truncation(1.0, 10**9)
BUCKETS = ((0.0, 0.01), (0.01, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, math.inf))
NAMES = ["all", "0 to 0.01", "0.01 to 0.1", "0.1 to 0.5", "0.5 to 0.9", "0.9 to 1"]


@dataclass(frozen=True, slots=True)
class Position:
    """An observed token under models that are known in full, as probabilities."""

    base: list[float]
    teacher: list[float]
    observed: int
    mask: float = 1.0
    plain_base: tuple[float, ...] = ()  # where `base` is at another temperature

    @property
    def b(self) -> float:
        return self.base[self.observed]

    @property
    def q(self) -> float:
        return self.teacher[self.observed]

    @property
    def scored_base(self) -> Sequence[float]:
        return self.plain_base or self.base

    def at(self, temperature: float, teacher_temperature: float) -> "Position":
        return Position(
            powered(self.base, 1 / temperature),
            powered(self.teacher, 1 / teacher_temperature),
            self.observed,
            self.mask,
            tuple(self.base),
        )


Demonstration = list[Position]


def powered(probs: Sequence[float], power: float) -> list[float]:
    weights = [prob**power for prob in probs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def random_demonstrations(seed: int, size: int = VOCAB_SIZE) -> list[Demonstration]:
    """Of 0 to 5 tokens, some likely, some not."""
    rng = np.random.default_rng(seed)

    def probs(observed: int, pull: float) -> list[float]:
        logits = 2 * rng.standard_normal(size)
        logits[observed] += pull
        return powered([math.exp(logit) for logit in logits], 1)

    def position(pull: float) -> Position:
        observed = int(rng.integers(size))
        mask = float(rng.choice([0.0, 0.04, 1.0]))
        return Position(probs(observed, pull), probs(observed, pull), observed, mask)

    return [
        [position(float(rng.uniform(-3, 9))) for _ in range(length)]
        for length in (0, 1, 1, 2, 2, 3, 3, 4, 5, 5)
    ]


def scored(
    name: str, positions: Demonstration, models: Sequence[Sequence[float]], top_k: int
) -> ScoredExample:
    """As a scorer stores it, but for the rounding."""
    ids = [sorted(range(len(p)), key=lambda token: -p[token])[:top_k] for p in models]
    observed = [position.observed for position in positions]
    entries = [p[token] for p, top in zip(models, ids, strict=True) for token in top]
    return ScoredExample(
        id=name,
        input_ids=np.array([0, *observed], np.int32),
        positions=np.arange(1, len(observed) + 1, dtype=np.int32),
        observed_log_probs=np.log([p[y] for p, y in zip(models, observed, strict=True)]),
        observed_ranks=np.ones(len(observed), np.int32),
        counts=np.array([len(top) for top in ids], np.int32),
        topk_ids=np.array([token for top in ids for token in top], np.int32),
        topk_log_probs=np.log(entries),
        tail_mass=np.array(
            [
                math.fsum(prob for token, prob in enumerate(p) if token not in top)
                for p, top in zip(models, ids, strict=True)
            ]
        ),
        token_weights=np.array([position.mask for position in positions]),
    )


def evidence_of(
    demonstrations: Sequence[Demonstration],
    top_k: int = 10**9,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Evidence:
    size = max([len(at.base) for each in demonstrations for at in each], default=VOCAB_SIZE)
    schema = schema_of("score", size)
    own, other = (
        flatten(
            schema,
            [
                scored(str(row), each, [getattr(at, model) for at in each], top_k)
                for row, each in enumerate(demonstrations)
            ],
        )
        for model in ("base", "teacher")
    )
    k = min(top_k, size)
    base, teacher = ScoreModel(k, size, temperature), ScoreModel(k, size, teacher_temperature)
    return Evidence(own, base, other, teacher)


def sums_of(evidence: Evidence, choice: Choice, truncation: Truncation = WHOLE) -> dict[str, float]:
    residual = stored_residual(evidence, choice, truncation)
    return ceiling_sums(evidence, choice, residual)


# The targets over the whole vocabulary while the student is the base.


FLOW_TAU, CLEANING_THRESHOLD = 2.0, 0.1
STATISTICS = {
    "flow": {"tau": FLOW_TAU},
    "token-cleaning": {"threshold": CLEANING_THRESHOLD},
    "talr": {"tau": FLOW_TAU},
    "se-kd": {"threshold": 1.0},
    "tip": {"threshold": 1.0},
}


def target_at_start(choice: Choice, at: Position) -> tuple[float, list[float]]:
    """γ and Q; where γ is a weight from the data, Q is one-hot."""
    name = choice.method.name
    base, teacher = ([math.log(prob) for prob in probs] for probs in (at.base, at.teacher))
    token = Token(followed=base, base=base, teacher=teacher, observed=at.observed, mask=at.mask)
    trust, residual, _ = FORMULAS[name](token, DEFAULTS[name] | STATISTICS.get(name, {}))
    facts = FACTS[name, choice.form]
    if "w" in facts.letters and "s" not in facts.letters:
        return trust, one_hot(token)
    target = [(1 - trust) * prob for prob in residual]
    target[at.observed] += trust
    return trust, target


def divergence(of: Sequence[float], to: Sequence[float]) -> float:
    return math.fsum(p * math.log(p / q) for p, q in zip(of, to, strict=True) if p)


def wanted_at(choice: Choice, at: Position) -> dict[str, float]:
    trust, target = target_at_start(choice, at)
    own = target[at.observed]
    others = [prob for token, prob in enumerate(target) if token != at.observed]
    return {
        "nll": -math.log(max(own, 1e-10)),
        "learnable": float(own > max(others)),
        "starved": float(trust < 0.05),
        "divergence": divergence(target, at.scored_base),
    }


def wanted_ceilings(choice: Choice, demonstrations: Sequence[Demonstration]) -> list[Ceiling]:
    rows: list[list[dict[str, float]]] = [[] for _ in NAMES]
    for at in (at for each in demonstrations for at in each):
        base = at.scored_base[at.observed]
        bucket = next(place for place, (low, high) in enumerate(BUCKETS) if low <= base < high)
        for row in (0, 1 + bucket):
            rows[row].append(wanted_at(choice, at))
    return [
        Ceiling(
            name,
            len(values),
            **{
                key: math.fsum(value[key] for value in values) / max(len(values), 1)
                for key in ("nll", "learnable", "starved", "divergence")
            },
        )
        for name, values in zip(NAMES, rows, strict=True)
    ]


def wanted_share(choice: Choice, demonstrations: Sequence[Demonstration]) -> float:
    whole = [all(wanted_at(choice, at)["learnable"] for at in each) for each in demonstrations]
    return sum(whole) / len(whole)


def assert_ceilings(found: Sequence[Ceiling], wanted: Sequence[Ceiling]) -> None:
    assert [(row.name, row.positions) for row in found] == [
        (row.name, row.positions) for row in wanted
    ]
    for row, other in zip(found, wanted, strict=True):
        assert row.nll == pytest.approx(other.nll, rel=1e-9, abs=1e-10)
        assert row.learnable == pytest.approx(other.learnable, abs=1e-14)
        assert row.starved == pytest.approx(other.starved, abs=1e-14)
        assert row.divergence == pytest.approx(other.divergence, rel=1e-9, abs=1e-10)


def settled(choice: Choice) -> Choice:
    if choice.unresolved is None:
        return choice
    (value,) = STATISTICS[choice.method.name].values()
    return choice.resolved(value)


def name_of(choice: Choice) -> str:
    return f"{choice.method.name} {choice.form}"


CHOICES = [settled(choice) for choice in choices() if choice.method.name != "gem"]
each_choice = pytest.mark.parametrize("choice", CHOICES, ids=name_of)
DEMONSTRATIONS = random_demonstrations(0) + random_demonstrations(1)
