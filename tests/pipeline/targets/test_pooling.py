"""Means of several teachers against dense arithmetic, on whole and on truncated supports."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qpipe.pipeline.targets.distributions import Supports
from qpipe.pipeline.targets.pooling import Mean, Pooling, pooled

N, V = 40, 12
Floats = NDArray[np.float64]


def of_rows(probs_NV: Floats, known_NV: NDArray[np.bool_]) -> Supports:
    """What is known of each row, most probable first, and the mass of the rest."""
    pairs = zip(probs_NV, known_NV, strict=True)
    orders = [[k for k in np.argsort(-row) if known[k]] for row, known in pairs]
    return Supports(
        np.array([len(order) for order in orders]),
        np.concatenate(orders).astype(np.int32),
        np.log(np.concatenate([row[order] for row, order in zip(probs_NV, orders, strict=True)])),
        np.where(known_NV, 0.0, probs_NV).sum(1),
    )


def rows_of(supports: Supports) -> list[dict[int, float]]:
    rows = np.split(np.arange(len(supports.ids)), np.cumsum(supports.counts)[:-1])
    for row in rows:
        assert np.all(np.diff(supports.log_probs[row]) <= 0)
        assert len(set(supports.ids[row].tolist())) == len(row)
    return [{int(supports.ids[k]): float(supports.probs[k]) for k in row} for row in rows]


def random_teachers(rng: np.random.Generator, count: int) -> tuple[list[Floats], list[Floats]]:
    """Distributions, and what is known of each: the first id everywhere."""
    probs = [rng.dirichlet(np.full(V, 0.4), N) + 1e-9 for _ in range(count)]
    probs = [each / each.sum(1, keepdims=True) for each in probs]
    known = [rng.random((N, V)) < rng.random((N, 1)) for _ in range(count)]
    for each in known:
        each[:, 0] = True
    return probs, known


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.floats(0.05, 5), min_size=2, max_size=4),
    mean=st.sampled_from(["arithmetic", "geometric"]),
)
def test_a_mean_is_the_dense_one_or_as_near_as_its_tail(
    seed: int, weights: list[float], mean: Mean
) -> None:
    """1,000 positions, some of them known in full."""
    rng = np.random.default_rng(seed)
    pooling = Pooling(tuple(w / sum(weights) for w in weights), mean)
    probs, known = random_teachers(rng, len(weights))
    for each in known:
        each[:5] = True
    made = pooled([of_rows(*pair) for pair in zip(probs, known, strict=True)], pooling)

    pairs = list(zip(pooling.weights, probs, strict=True))
    if mean == "arithmetic":
        dense = sum(w * each for w, each in pairs)
    else:
        dense = np.exp(sum(w * np.log(each) for w, each in pairs))
        dense = dense / dense.sum(1, keepdims=True)
    for n, row in enumerate(rows_of(made)):
        tail = float(made.tail_mass[n])
        assert math.fsum([*row.values(), tail]) == pytest.approx(1, abs=1e-12)
        if n < 5:
            assert row == pytest.approx(dict(enumerate(dense[n].tolist())), abs=1e-10)
        is_known = [each[n] for each in known]
        support = np.logical_or.reduce(is_known) if mean == "arithmetic" else np.all(is_known, 0)
        assert set(row) == set(np.flatnonzero(support).tolist())
        excess = np.array([row.get(k, 0.0) for k in range(V)]) - dense[n]
        if mean == "arithmetic":
            assert np.all(excess <= 1e-12)  # lower bounds
        assert np.abs(excess[support]).sum() <= tail + 1e-12
        if mean == "geometric":
            tails = [each[n][~support].sum() for each in probs]
            heads = [each[n][support] for each in probs]
            weighted = list(zip(pooling.weights, heads, tails, strict=True))
            product = np.exp(sum(w * np.log(head) for w, head, _ in weighted))
            rest = math.prod(max(tail, 0.0) ** w for w, _, tail in weighted)
            wanted = product / (product.sum() + rest)
            np.testing.assert_allclose([row[k] for k in np.flatnonzero(support)], wanted, 1e-10)


def test_means_worked_out_by_hand() -> None:
    """Two teachers; the second does not know id 1, the first not id 2."""
    one = Supports(np.array([2]), np.array([0, 1], np.int32), np.log([0.6, 0.3]), np.array([0.1]))
    two = Supports(np.array([2]), np.array([2, 0], np.int32), np.log([0.5, 0.2]), np.array([0.3]))
    made = pooled([one, two], Pooling((0.75, 0.25)))
    assert rows_of(made) == [pytest.approx({0: 0.5, 1: 0.225, 2: 0.125})]
    assert made.tail_mass.tolist() == [pytest.approx(0.15)]

    made = pooled([one, two], Pooling((0.5, 0.5), "geometric"))
    share, rest = math.sqrt(0.6 * 0.2), math.sqrt(0.4 * 0.8)  # all but id 0 is the tail
    assert rows_of(made) == [pytest.approx({0: share / (share + rest)})]
    assert made.tail_mass.tolist() == [pytest.approx(rest / (share + rest))]


def test_the_mean_of_a_teacher_with_itself_is_the_teacher() -> None:
    rng = np.random.default_rng(0)
    (probs,), (known,) = random_teachers(rng, 1)
    one = of_rows(probs, known)
    for mean in ("arithmetic", "geometric"):
        made = pooled([one, one], Pooling((0.3, 0.7), mean))
        assert made.ids.tolist() == one.ids.tolist()
        np.testing.assert_allclose(made.probs, one.probs, rtol=1e-12)
        np.testing.assert_allclose(made.tail_mass, one.tail_mass, rtol=1e-12, atol=1e-15)
