"""Distributions known in full, the scores that hold a part of them, and ragged supports as rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.targets.distributions import (
    LOG_OF_ZERO,
    Supports,
    safe_log,
)

Probs = list[float]
seeds = st.integers(0, 2**32 - 1)
vocab_sizes = st.integers(2, 30)
spreads = st.sampled_from([0.0, 0.5, 2.0, 8.0, 100.0])
shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])  # of the vocabulary in the top k
top_ps = st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0]) | st.floats(1e-6, 1)
max_supports = st.sampled_from([1, 2, 5, 64, 10**9])


@dataclass(frozen=True)
class Known:
    """What is known at a position: some of a dense distribution's tokens, and the observed one."""

    probs: Probs
    ids: list[int]  # most probable first
    observed: int

    @property
    def tail(self) -> float:
        return outside(self.probs, self.ids)

    @property
    def all_ids(self) -> list[int]:
        return self.ids if self.observed in self.ids else [*self.ids, self.observed]

    def support(self) -> "Row":
        return Row({token: self.probs[token] for token in self.all_ids}, self.all_tail)

    @property
    def all_tail(self) -> float:
        return outside(self.probs, self.all_ids)


@dataclass(frozen=True)
class Row:
    """A position's support as token: probability, and its tail."""

    entries: Mapping[int, float]
    tail: float = field(default=0.0)


def outside(probs: Probs, ids: Sequence[int]) -> float:
    return math.fsum(prob for token, prob in enumerate(probs) if token not in ids)


def random_probs(rng: np.random.Generator, size: int, spread: float, tied: bool = False) -> Probs:
    logits = spread * rng.standard_normal(size)
    if tied:
        logits = np.round(logits)
    weights = [math.exp(logit - max(logits)) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def ranked(probs: Probs) -> list[int]:
    return sorted(range(len(probs)), key=lambda token: -probs[token])


def random_known(
    rng: np.random.Generator, size: int, spread: float, top_k: int, extra: int = 0
) -> Known:
    """The top k, some ids gathered besides, and an observed token from anywhere."""
    probs = random_probs(rng, size, spread)
    top = set(ranked(probs)[:top_k]) | set(rng.integers(0, size, extra).tolist())
    ids = [token for token in ranked(probs) if token in top]
    return Known(probs, ids, int(rng.integers(size)))


def scores_of(rows: Sequence[Known], dtype: type = np.float64) -> FlatBatch:
    """One example with these positions, with nothing rounded unless by the type."""
    counts = np.array([len(row.ids) for row in rows], np.int32)
    entries = [row.probs[token] for row in rows for token in row.ids]
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array(entries, np.float64))
        observed = np.log(np.array([row.probs[row.observed] for row in rows], np.float64))
    arrays: dict[str, Any] = {
        "input_ids": np.array([0, *(row.observed for row in rows)], np.int32),
        "positions": np.arange(1, len(rows) + 1, dtype=np.int32),
        "counts": counts,
        "topk_ids": np.array([token for row in rows for token in row.ids], np.int32),
        "topk_log_probs": log_probs.astype(dtype),
        "observed_log_probs": observed.astype(dtype),
        "tail_mass": np.array([row.tail for row in rows], dtype),
    }
    lengths = {"token": len(rows) + 1, "position": len(rows), "entry": int(counts.sum())}
    return FlatBatch(["a"], arrays, {level: np.array([size]) for level, size in lengths.items()})


def supports_of(rows: Sequence[Row]) -> Supports:
    probs = np.array([prob for row in rows for prob in row.entries.values()], np.float64)
    return Supports(
        np.array([len(row.entries) for row in rows], np.int64),
        np.array([token for row in rows for token in row.entries], np.int32),
        safe_log(probs, LOG_OF_ZERO),  # as scores do
        np.array([row.tail for row in rows], np.float64),
    )


def observed_of(rows: Sequence[Known]) -> Any:
    return np.array([row.observed for row in rows], np.int32)


def rows_of(supports: Supports) -> list[Row]:
    """Each position's support in its order; an id that stands twice is an error."""
    ends = np.cumsum(supports.counts).tolist()
    assert len(supports.ids) == len(supports.log_probs) == (ends[-1] if ends else 0)
    rows = []
    for end, count, tail in zip(ends, supports.counts, supports.tail_mass, strict=True):
        ids = supports.ids[end - count : end].tolist()
        log_probs = supports.log_probs[end - count : end].tolist()
        assert len(set(ids)) == len(ids)
        probs = [math.exp(log_prob) for log_prob in log_probs]
        rows.append(Row(dict(zip(ids, probs, strict=True)), float(tail)))
    return rows


def assert_rows(
    supports: Supports, wanted: Sequence[Row], rtol: float = 1e-12, atol: float = 1e-300
) -> None:
    """The same ids in the same order, the same probabilities, the same tails."""
    found = rows_of(supports)
    assert [list(row.entries) for row in found] == [list(row.entries) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            list(row.entries.values()), list(other.entries.values()), rtol=rtol, atol=atol
        )
        np.testing.assert_allclose(row.tail, other.tail, rtol=rtol, atol=atol)
