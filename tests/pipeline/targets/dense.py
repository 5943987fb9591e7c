"""Demonstrations under models known in full, their targets over the whole vocabulary."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from qpipe.pipeline.format.batches import flatten, split
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.targets.build import (
    Evidence,
    ScoreModel,
    Targets,
    Truncation,
    flat_targets,
    targets_of,
)
from qpipe.pipeline.targets.distributions import Supports
from qpipe.tests.support.methods import (
    DEFAULTS,
    FACTS,
    FORMULAS,
    Token,
    base_entropy,
    importance,
    one_hot,
)

VOCAB_SIZE = 20
WHOLE = Truncation(1.0, 10**9)
Rows = list[list[float]]  # a distribution, or its logs, at each position


# Demonstrations under models that are known in full.


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A demonstration under models known in full."""

    name: str
    input_ids: list[int]
    positions: list[int]
    base: Rows  # log-probabilities
    teacher: Rows
    token_weights: list[float]

    @property
    def observed(self) -> list[int]:
        return [self.input_ids[position] for position in self.positions]

    def scored(
        self, log_probs: Rows, top_k: int, gathered: Sequence[int] = (), dtype: type = np.float64
    ) -> ScoredExample:
        """The example as a scorer stores it, but for the rounding."""
        ids, tails, ranks = [], [], []
        for row, observed in zip(log_probs, self.observed, strict=True):
            order = sorted(range(len(row)), key=lambda token: -row[token])
            top = {*order[:top_k], *gathered}
            ids.append([token for token in order if token in top])
            tails.append(math.fsum(math.exp(row[token]) for token in order if token not in top))
            ranks.append(sum(each >= row[observed] for each in row))
        observed_log_probs = [
            row[observed] for row, observed in zip(log_probs, self.observed, strict=True)
        ]
        entries = [
            row[token] for row, tokens in zip(log_probs, ids, strict=True) for token in tokens
        ]
        return ScoredExample(
            id=self.name,
            input_ids=np.array(self.input_ids, np.int32),
            positions=np.array(self.positions, np.int32),
            observed_log_probs=np.array(observed_log_probs, dtype),
            observed_ranks=np.array(ranks, np.int32),
            counts=np.array([len(tokens) for tokens in ids], np.int32),
            topk_ids=np.array([token for tokens in ids for token in tokens], np.int32),
            topk_log_probs=np.array(entries, dtype),
            tail_mass=np.array(tails, dtype),
            token_weights=np.array(self.token_weights, dtype),
        )


def log_softmax(logits: Sequence[float]) -> list[float]:
    log_norm = math.log(math.fsum(math.exp(logit) for logit in logits))
    return [logit - log_norm for logit in logits]


def random_dense(
    seed: int,
    positions: int = 6,
    teacher_size: int = VOCAB_SIZE,
    spread: float = 2.0,
    weights: Sequence[float] = (0.0, 0.25, 1.0),
) -> Dense:
    rng = np.random.default_rng(seed)
    tokens = positions + 3
    base = spread * rng.standard_normal((positions, VOCAB_SIZE))
    teacher = spread * rng.standard_normal((positions, teacher_size))
    teacher[:, :VOCAB_SIZE] += 0.5 * base
    return Dense(
        name=f"chats:{seed}",
        input_ids=rng.integers(0, VOCAB_SIZE, tokens).tolist(),
        positions=sorted(rng.choice(np.arange(1, tokens), positions, replace=False).tolist()),
        base=[log_softmax(row) for row in base.tolist()],
        teacher=[log_softmax(row) for row in teacher.tolist()],
        token_weights=rng.choice(list(weights), positions).tolist(),
    )


def one_position(base: Sequence[float], observed: int, teacher: Sequence[float] = ()) -> Dense:
    """Of probabilities, 0 among them."""
    logs = [[math.log(p) if p else -math.inf for p in probs] for probs in (base, teacher or base)]
    return Dense("one", [0, observed], [1], [logs[0]], [logs[1]], [1.0])


def evidence_of(
    demonstrations: Sequence[Dense],
    top_k: int = VOCAB_SIZE,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    gathered: Sequence[int] = (),
    dtype: type = np.float64,
) -> Evidence:
    """Both models' scores; ids are gathered at the base alone."""
    base_size = max(len(row) for each in demonstrations for row in each.base)
    teacher_size = max(len(row) for each in demonstrations for row in each.teacher)
    own = [each.scored(each.base, top_k, gathered, dtype) for each in demonstrations]
    other = [each.scored(each.teacher, top_k, (), dtype) for each in demonstrations]
    return Evidence(
        flatten(schema_of("score", base_size), own),
        ScoreModel(top_k, base_size, temperature),
        flatten(schema_of("score", teacher_size), other),
        ScoreModel(top_k, teacher_size, teacher_temperature),
    )


# The targets over the whole vocabulary.


def tempered(log_probs: Sequence[float], temperature: float) -> list[float]:
    return log_softmax([each / temperature for each in log_probs])


def tokens_of(
    demonstrations: Sequence[Dense], temperature: float = 1.0, teacher_temperature: float = 1.0
) -> list[Token]:
    """Every position; what the teacher's vocabulary has beyond the base's is left out."""
    tokens = [
        Token(
            followed=(own := tempered(base, temperature)),
            base=own,
            teacher=tempered(teacher, teacher_temperature)[: len(base)],
            observed=observed,
            mask=mask,
        )
        for each in demonstrations
        for base, teacher, observed, mask in zip(
            each.base, each.teacher, each.observed, each.token_weights, strict=True
        )
    ]
    excesses = [token.teacher[token.observed] - token.base[token.observed] for token in tokens]
    losses = [-token.base[token.observed] for token in tokens]
    return [replace(token, losses=losses, excesses=excesses) for token in tokens]


def wanted_target(choice: Choice, token: Token, statistic: float) -> tuple[list[float], float]:
    """Q over the vocabulary, and the weight of the loss."""
    name = choice.method.name
    given = DEFAULTS[name] | STATISTICS.get(name, lambda _: {})(statistic)
    trust, residual, scale = FORMULAS[name](token, given)
    mask = 1 if name == "cft" else token.mask
    if "w" in FACTS[name, choice.form].letters:
        return one_hot(token), trust * scale * mask
    target = [(1 - trust) * prob for prob in residual]
    target[token.observed] += trust
    return target, scale * mask


STATISTICS: dict[str, Callable[[float], dict[str, float]]] = {
    **dict.fromkeys(("flow", "talr"), lambda value: {"tau": value}),
    **dict.fromkeys(("token-cleaning", "se-kd", "tip"), lambda value: {"threshold": value}),
}


def settled(choice: Choice, tokens: Sequence[Token]) -> tuple[Choice, float]:
    """The choice with its statistic, a last bit lower where it is an indicator's threshold.

    The median loss of the base for flow and talr; the least excess loss of the top 60 % for
    cleaning; the least entropy, or importance, of the top 20 % for kd at chosen positions.
    """
    if choice.unresolved is None:
        return choice, math.nan
    match choice.method.name:
        case "flow" | "talr":
            statistic = float(np.median(tokens[0].losses))
        case "token-cleaning":
            excesses = sorted(tokens[0].excesses, reverse=True)
            statistic = excesses[int(0.6 * len(excesses)) - 1]
        case name:
            value = {"se-kd": base_entropy, "tip": importance}[name]
            values = sorted(map(value, tokens), reverse=True)
            statistic = values[math.ceil(0.2 * len(values)) - 1]
    statistic -= 1e-9
    return choice.resolved(statistic), statistic


# What the code made.


def by_position(counts: Any, values: Any) -> list[list[Any]]:
    ends = np.cumsum(counts)
    return [values[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def supports_of(counts: Any, ids: Any, probs: Any) -> list[dict[int, float]]:
    """Each position's support as token: probability."""
    pairs = zip(by_position(counts, ids), by_position(counts, probs), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]


def residuals(residual: Supports) -> list[dict[int, float]]:
    return supports_of(residual.counts, residual.ids, residual.probs)


def rebuilt(targets: Targets, positions: Sequence[Token]) -> tuple[Rows, list[float]]:
    """Q over the vocabulary from what is stored, and its mass outside of the support; what a
    uniform residual has there is spread evenly."""
    rows, tails = [], []
    for at, trust, support, tail in zip(
        positions,
        targets.trust.tolist(),
        residuals(targets.residual),
        targets.residual.tail_mass.tolist(),
        strict=True,
    ):
        size = len(at.base)
        spread = 0.0
        if targets.choice.stored == "uniform":
            spread, tail = tail / (size - len(support)), 0.0
        row = [(1 - trust) * support.get(token, spread) for token in range(size)]
        row[at.observed] += trust
        assert at.observed in support
        rows.append(row)
        tails.append((1 - trust) * tail)
    return rows, tails


def stored(
    evidence: Evidence, choice: Choice, truncation: Truncation = WHOLE
) -> list[TargetExample]:
    made = flat_targets(evidence, targets_of(evidence, choice, truncation))
    schema = schema_of("build-targets", evidence.base_model.vocab_size)
    return list(split(schema, made))


def as_bytes(record: Any) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value if name == "id" else value.tobytes() for name, value in values.items()}
