"""Divergences on truncated supports: within their bound, which cannot be tightened by much."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.methods.table import METHODS
from qpipe.tests.support import divergences
from qpipe.tests.support.methods import DEFAULTS, DIVERGENCES

COUNT = 200  # positions at a time


def parts(
    name: str, log_p: np.ndarray, log_q: np.ndarray, given: dict[str, Any], library: str
) -> tuple[np.ndarray, np.ndarray]:
    """The value and the gradient p − Q of the code under test."""
    divergence = METHODS[name].divergence
    assert divergence is not None
    arrays = [log_p, log_q] if library == "numpy" else map(torch.from_numpy, (log_p, log_q))
    with np.errstate(all="ignore"):
        value, target = divergence(*arrays, given)
    return np.asarray(value), np.exp(log_p) - np.asarray(target)


def bounds(name: str, log_p: np.ndarray, log_q: np.ndarray, given: dict[str, Any]) -> np.ndarray:
    divergence = METHODS[name].divergence
    assert divergence is not None
    return divergence.bound(log_p, log_q, given)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spreads=st.tuples(st.floats(0.05, 12), st.floats(0.05, 12)),
    share=st.floats(1e-3, 0.999),
)
def test_truncation_errs_by_no_more_than_the_bound(
    name: str, library: str, seed: int, spreads: tuple[float, float], share: float
) -> None:
    """2,000 positions of each; the gradient of the whole is written out in `divergences`."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 25))
    logits = [spread * rng.standard_normal((COUNT, vocab)) for spread in spreads]
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=1)[:, None] for z in logits)
    inside = rng.random((COUNT, vocab)) < rng.random((COUNT, 1))
    inside[:, 0] = True
    given_parameters = dict.fromkeys(DEFAULTS[name], share)

    tails = [np.logaddexp.reduce(np.where(inside, -np.inf, z), axis=1) for z in (log_p, log_q)]
    coarse = [
        np.concatenate([np.where(inside, z, -np.inf), tail[:, None]], axis=1)
        for z, tail in zip((log_p, log_q), tails, strict=True)
    ]
    value, gradient = parts(name, *coarse, given_parameters, library)
    tail_shape = np.exp(log_p - np.where(inside.all(1), 0.0, tails[0])[:, None])
    found = np.where(inside, gradient[:, :-1], gradient[:, -1:] * tail_shape)
    exact = [
        divergences.gradient(name, list(p), list(q), given_parameters)
        for p, q in zip(log_p, log_q, strict=True)
    ]
    whole = [
        divergences.value(name, list(p), list(q), given_parameters)
        for p, q in zip(log_p, log_q, strict=True)
    ]
    error = np.abs(found - exact).sum(1)
    with np.errstate(all="ignore"):
        bound = bounds(name, *tails, given_parameters)

    assert np.all(error <= np.where(inside.all(1), 0.0, bound) + 1e-12)
    np.testing.assert_allclose(error[inside.all(1)], 0, atol=1e-12)
    assert np.all(value <= np.array(whole) + 1e-10)  # outcomes that are merged tell less
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "share"), [("reverse-kl", 0.5), ("jsd", 0.0), ("jsd", 0.5), ("skew-kl", 0.1)]
)
def test_the_bound_is_nearly_reached_where_the_tails_do_not_meet(name: str, share: float) -> None:
    tiny = divergences.LEAST
    log_p, log_q = np.log([[0.99, 0.01, tiny]]), np.log([[0.9, tiny, 0.1]])
    given_parameters = dict.fromkeys(DEFAULTS[name], share)
    coarse = [np.log([[0.99, 0.01 + tiny]]), np.log([[0.9, 0.1 + tiny]])]
    _, gradient = parts(name, *coarse, given_parameters, "numpy")
    exact = divergences.gradient(name, list(log_p[0]), list(log_q[0]), given_parameters)
    error = sum(map(abs, np.array([*gradient[0], 0.0]) - exact))

    bound = bounds(name, coarse[0][:, 1], coarse[1][:, 1], given_parameters)
    assert 0.9 * bound[0] < error <= bound[0]


def test_values_worked_out_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    m = (0.375, 0.625)
    halves = sum(
        0.5 * (a * math.log(a / c) + b * math.log(b / c))
        for a, b, c in zip((0.5, 0.5), (0.25, 0.75), m, strict=True)
    )
    for name, given_parameters, wanted in (
        ("reverse-kl", {}, reverse),
        ("mixed-kl", {"lam": 0.25}, 0.75 * forward + 0.25 * reverse),
        ("jsd", {"beta": 0.0}, forward),
        ("jsd", {"beta": 0.5}, halves),
        ("jsd", {"beta": 1.0}, reverse),
        ("skew-kl", {"alpha": 0.5}, 0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])),
        (
            "skew-reverse-kl",
            {"alpha": 0.5},
            0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]),
        ),
    ):
        value, _ = parts(name, p, q, given_parameters, "numpy")
        assert float(value) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-9])
def test_jsd_goes_to_the_two_divergences_as_its_share_goes_to_its_ends(beta: float) -> None:
    rng = np.random.default_rng(0)
    log_p, log_q = (z - np.logaddexp.reduce(z) for z in rng.standard_normal((2, 9)))
    small = min(beta, 1 - beta)
    value, gradient = parts("jsd", log_p, log_q, {"beta": beta}, "numpy")
    limit, its_gradient = parts("jsd", log_p, log_q, {"beta": float(round(beta))}, "numpy")

    np.testing.assert_allclose(value / small, limit, rtol=1e-5)
    np.testing.assert_allclose(gradient / small, its_gradient, rtol=1e-5, atol=1e-7)
