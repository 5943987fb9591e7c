"""Examples, scored examples and targets, written down or drawn at random."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from qpipe.pipeline.format.records import ScoredExample, TargetExample, WeightedExample

VOCAB, TOP_K = 300, 12  # of the random model


def unweighted(
    name: str, input_ids: NDArray[np.int32], positions: NDArray[np.int32]
) -> WeightedExample:
    """An example whose demonstration came without weights."""
    return WeightedExample(name, input_ids, positions, np.ones(len(positions), np.float32))


def dense_scored(
    name: str,
    input_ids: ArrayLike,
    positions: ArrayLike,
    log_probs_NV: NDArray[np.float64],
    top_k: int,
    weights: ArrayLike | None = None,
) -> ScoredExample:
    """An example under a model known in full, as an engine scores it: each position's top k, and
    the probability outside of it."""
    ids, at = np.array(input_ids, np.int32), np.array(positions, np.int32)
    order = np.argsort(-log_probs_NV, axis=1, kind="stable")
    top, rest = order[:, :top_k], order[:, top_k:]
    observed = np.take_along_axis(log_probs_NV, ids[at][:, None], axis=1)
    entries = np.take_along_axis(log_probs_NV, top, axis=1)
    return ScoredExample(
        id=name,
        input_ids=ids,
        positions=at,
        observed_log_probs=observed[:, 0].astype(np.float32),
        observed_ranks=(log_probs_NV >= observed).sum(axis=1).astype(np.int32),
        counts=np.full(len(top), top.shape[1], np.int32),
        topk_ids=top.ravel().astype(np.int32),
        topk_log_probs=entries.ravel().astype(np.float32),
        tail_mass=np.exp(np.take_along_axis(log_probs_NV, rest, axis=1)).sum(1).astype(np.float32),
        token_weights=np.array(np.ones(len(at)) if weights is None else weights, np.float32),
    )


def of_probs(
    name: str, probs: Sequence[Sequence[float]], observed: Sequence[int], top_k: int
) -> ScoredExample:
    """A demonstration whose every token but the first is supervised, under these distributions."""
    log_probs = np.log(np.array(probs, np.float64))
    return dense_scored(name, [0, *observed], range(1, len(observed) + 1), log_probs, top_k)


def random_scored(number: int) -> ScoredExample:
    """A demonstration of `number` positions under a random model."""
    rng = np.random.default_rng(number)
    logits = 2 * rng.standard_normal((number, VOCAB))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    tokens = number + 2
    input_ids = rng.integers(0, VOCAB, tokens)
    return dense_scored(f"chats:{number}", input_ids, range(2, tokens), log_probs, TOP_K)


def scored(
    name: str,
    ids: Sequence[int],
    supports: Sequence[dict[int, float]],
    first: int | None = None,
    positions: Sequence[int] | None = None,
) -> ScoredExample:
    """Scores of the last tokens of `ids`, one support a token; the observed one stands in each."""
    at = _positions(ids, supports, first, positions)
    probs = [np.array([support[ids[place]] for support, place in zip(supports, at, strict=True)])]
    ordered = [sorted(support.items(), key=lambda item: -item[1]) for support in supports]
    ranks = [
        sum(each >= support[ids[place]] for each in support.values())
        for support, place in zip(supports, at, strict=True)
    ]
    return ScoredExample(
        id=name,
        input_ids=np.array(ids, np.int32),
        positions=np.array(at, np.int32),
        observed_log_probs=np.log(probs[0]).astype(np.float32),
        observed_ranks=np.array(ranks, np.int32),
        counts=np.array([len(support) for support in supports], np.int32),
        topk_ids=np.array([each for rows in ordered for each, _ in rows], np.int32),
        topk_log_probs=np.log([p for rows in ordered for _, p in rows]).astype(np.float32),
        tail_mass=np.array([_tail(support) for support in supports], np.float32),
        token_weights=np.ones(len(at), np.float32),
    )


def targeted(
    name: str,
    ids: Sequence[int],
    trust: Sequence[float],
    supports: Sequence[dict[int, float]],
    weights: Sequence[float] | None = None,
    positions: Sequence[int] | None = None,
) -> TargetExample:
    """Targets of the last tokens of `ids`: γ and the residual of each."""
    at = _positions(ids, supports, None, positions)
    return TargetExample(
        id=name,
        input_ids=np.array(ids, np.int32),
        positions=np.array(at, np.int32),
        trust=np.array(trust, np.float32),
        counts=np.array([len(support) for support in supports], np.int32),
        support_ids=np.array([each for support in supports for each in support], np.int32),
        support_probs=np.array([p for support in supports for p in support.values()], np.float32),
        tail_mass=np.array([_tail(support) for support in supports], np.float32),
        weights=np.array(weights or [1.0] * len(trust), np.float32),
    )


def as_targets(example: ScoredExample) -> TargetExample:
    """The example's own tokens as targets."""
    n = len(example.positions)
    return TargetExample(
        id=example.id,
        input_ids=example.input_ids,
        positions=example.positions,
        trust=np.full(n, 0.5, np.float32),
        counts=np.ones(n, np.int32),
        support_ids=example.observed_ids,
        support_probs=np.full(n, 0.75, np.float32),
        tail_mass=np.full(n, 0.25, np.float32),
        weights=np.ones(n, np.float32),
    )


def _positions(
    ids: Sequence[int],
    supports: Sequence[Any],
    first: int | None,
    positions: Sequence[int] | None,
) -> list[int]:
    if positions is not None:
        return list(positions)
    start = len(ids) - len(supports) if first is None else first
    return list(range(start, start + len(supports)))


def _tail(support: dict[int, float]) -> float:
    return max(1 - sum(support.values()), 0.0)
