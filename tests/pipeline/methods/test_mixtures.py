"""Mixtures of two distributions, worked out here, and the error bound of a truncated one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.methods import rules

from .arrays import LIBRARIES, NONE, as_array, log_of_sum, random_log_probs, seeds


def true_mixture(own: np.ndarray, other: np.ndarray, eta: float, alpha: float = 1.0) -> np.ndarray:
    if alpha == 1:
        weights = [math.exp((1 - eta) * p + eta * q) for p, q in zip(own, other, strict=True)]
    else:
        power = (1 - alpha) / 2
        weights = [
            ((1 - eta) * math.exp(power * p) + eta * math.exp(power * q)) ** (1 / power)
            for p, q in zip(own, other, strict=True)
        ]
    total = math.fsum(weights)
    return np.array([weight / total for weight in weights])


def truncated_mixture(
    own: np.ndarray, other: np.ndarray, inside: np.ndarray, eta: float, alpha: float = 1.0
) -> tuple[np.ndarray, float]:
    """The mixture over the whole vocabulary, its tail in the student's own shape; its tail mass."""
    mixed, tail = rules.mixture(
        own[inside],
        np.asarray(log_of_sum(own[~inside])),
        other[inside],
        np.asarray(log_of_sum(other[~inside])),
        eta,
        alpha,
    )
    tail_mass = math.exp(tail)
    whole = np.empty_like(own)
    whole[inside] = np.exp(np.asarray(mixed))
    if not inside.all():
        whole[~inside] = tail_mass * np.exp(own[~inside] - log_of_sum(own[~inside]))
    return whole, tail_mass


@settings(max_examples=2000, deadline=None)
@given(
    seed=seeds,
    vocab=st.integers(2, 40),
    spread=st.floats(0.05, 12),
    other_spread=st.floats(0.05, 12),
    kept=st.floats(0, 1),
    eta=st.floats(0, 1),
    alpha=st.just(1.0) | st.floats(-1, 0.9) | st.floats(1.1, 5),
    top=st.booleans(),
)
def test_truncation_errs_by_no_more_than_the_bound(
    seed: int,
    vocab: int,
    spread: float,
    other_spread: float,
    kept: float,
    eta: float,
    alpha: float,
    top: bool,
) -> None:
    """‖ĝ − g‖₁ ≤ 2·(1 − γ)·m̂ for live mixtures, the tail bucket in the student's shape."""
    rng = np.random.default_rng(seed)
    own, other = random_log_probs(rng, vocab, spread), random_log_probs(rng, vocab, other_spread)
    observed = int(rng.integers(vocab))
    size = max(1, round(kept * vocab))
    order = np.argsort(-other) if top else rng.permutation(vocab)
    inside = np.zeros(vocab, bool)
    inside[order[:size]] = True
    inside[observed] = True

    truncated, tail_mass = truncated_mixture(own, other, inside, eta, alpha)
    trust = math.exp(own[observed])
    exact = np.exp(own) - (1 - trust) * true_mixture(own, other, eta, alpha)
    bucketed = np.exp(own) - (1 - trust) * truncated
    error = float(np.abs(bucketed - exact).sum())

    np.testing.assert_allclose(truncated.sum(), 1, atol=1e-12)
    assert error <= 2 * (1 - trust) * tail_mass + 1e-13
    if inside.all() or eta == 0:
        assert error <= 1e-12


@pytest.mark.parametrize("seed", range(200))
def test_a_support_of_everything_and_an_eta_of_0_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 60))
    own, other = random_log_probs(rng, vocab, 4), random_log_probs(rng, vocab, 4)
    whole = np.ones(vocab, bool)
    part = rng.random(vocab) < 0.3
    part[0] = True
    for eta in (0.0, 0.3, 0.5, 1.0):
        mixed, tail_mass = truncated_mixture(own, other, whole, eta)
        np.testing.assert_allclose(mixed, true_mixture(own, other, eta), 1e-10, 1e-14)
        assert tail_mass == 0
    mixed, tail_mass = truncated_mixture(own, other, part, 0.0)
    np.testing.assert_allclose(mixed, np.exp(own), 1e-10, 1e-14)
    np.testing.assert_allclose(tail_mass, np.exp(own[~part]).sum(), 1e-10, 1e-14)


def test_the_bound_is_nearly_reached_where_the_tails_do_not_meet() -> None:
    """Outside of the support p and q have nothing in common: the true mixture has no tail."""
    own = np.log([0.2, 0.8 - 1e-30, 1e-30])
    other = np.log([0.2, 1e-30, 0.8 - 1e-30])
    inside = np.array([True, False, False])
    truncated, tail_mass = truncated_mixture(own, other, inside, 0.5)
    error = np.abs(truncated - true_mixture(own, other, 0.5)).sum()

    assert tail_mass == pytest.approx(0.8, rel=1e-9)
    assert error == pytest.approx(2 * tail_mass, rel=1e-9)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mixture_worked_out_by_hand(library: str) -> None:
    """√(0.4·0.1) = 0.2, √(0.2·0.8) = 0.4, and √(0.4·0.1) = 0.2 of the tails."""
    mixed, tail = rules.mixture(
        as_array(np.log([0.4, 0.2]), library),
        as_array(np.log(0.4), library),
        as_array(np.log([0.1, 0.8]), library),
        as_array(np.log(0.1), library),
        0.5,
    )

    np.testing.assert_allclose(np.exp(np.asarray(mixed)), [0.25, 0.5], rtol=1e-12)
    np.testing.assert_allclose(np.exp(np.asarray(tail)), 0.25, rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("alpha", "own", "other", "wanted"),
    [
        # the mean of both
        (-1.0, [0.1, 0.5, 0.4], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]),
        # (√p/2 + √q/2)²: (0.1 + 0.8)²/4, (0.3)²/4 and (0.9 + 0.6)²/4
        (0.0, [0.01, 0.09, 0.81], [0.64, 0.0, 0.36], [0.2025, 0.0225, 0.5625]),
        # the harmonic mean, 2·p·q/(p + q)
        (3.0, [0.1, 0.5, 0.4], [0.4, 0.5, 0.1], [0.16, 0.5, 0.16]),
        (3.0, [0.1, 0.5, 0.4], [0.4, 0.0, 0.6], [0.16, 0.0, 0.48]),
    ],
)
def test_a_power_mixture_worked_out_by_hand(
    alpha: float, own: list[float], other: list[float], wanted: list[float], library: str
) -> None:
    with np.errstate(divide="ignore"):
        log_own, log_other = np.log(own), np.log(other)
    mixed, tail = rules.mixture(
        as_array(log_own[:2], library),
        as_array(log_own[2], library),
        as_array(log_other[:2], library),
        as_array(log_other[2], library),
        0.5,
        alpha,
    )
    found = [*np.exp(np.asarray(mixed)), float(np.exp(np.asarray(tail)))]
    np.testing.assert_allclose(found, np.array(wanted) / sum(wanted), rtol=1e-12)


@pytest.mark.parametrize("alpha", [1 - 1e-3, 1 - 1e-7, 1 - 1e-12, 1 + 1e-12, 1 + 1e-7])
def test_a_power_mixture_next_to_the_geometric_one_does_not_cancel(alpha: float) -> None:
    """The mean to the first order in the power: that of the logs plus power·variance/2."""
    rng = np.random.default_rng(3)
    own, other = random_log_probs(rng, 30, 2), random_log_probs(rng, 30, 2)
    nothing = np.asarray(NONE)
    found, _ = rules.mixture(own, nothing, other, nothing, 0.3, alpha)
    weights = np.exp(0.7 * own + 0.3 * other + (1 - alpha) / 4 * 0.21 * (other - own) ** 2)

    np.testing.assert_allclose(
        np.exp(found), weights / weights.sum(), rtol=1e-12 + 50 * (1 - alpha) ** 2
    )


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("eta", "own_tail", "other_tail", "mixed_tail"),
    [
        (0.0, 0.4, 0.0, 0.4),  # the student alone, whatever the other's tail
        (0.0, 0.0, 0.1, 0.0),
        (1.0, 0.4, 0.1, 0.1),
        (1.0, 0.0, 0.1, 0.1),
        (1.0, 0.4, 0.0, 0.0),
        (0.5, 0.4, 0.0, 0.0),
        (0.5, 0.0, 0.1, 0.0),
        (0.5, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_a_tail_of_nothing_has_its_right_mass(
    eta: float, own_tail: float, other_tail: float, mixed_tail: float, library: str
) -> None:
    with np.errstate(divide="ignore"):
        own = np.log([1 - own_tail, own_tail])
        other = np.log([1 - other_tail, other_tail])
    mixed, tail = rules.mixture(
        as_array(own[:1], library),
        as_array(own[1], library),
        as_array(other[:1], library),
        as_array(other[1], library),
        eta,
    )

    np.testing.assert_allclose(np.exp(np.asarray(tail)), mixed_tail, rtol=1e-12)
    np.testing.assert_allclose(np.exp(np.asarray(mixed)), [1 - mixed_tail], rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_token_without_a_share_has_its_right_one_in_the_mixture(library: str) -> None:
    own = as_array([math.log(0.5), NONE, math.log(0.5)], library)
    other = as_array([math.log(0.25), math.log(0.75), NONE], library)
    nothing = as_array(NONE, library)
    for eta, wanted in ((0.0, [0.5, 0, 0.5]), (0.5, [1, 0, 0]), (1.0, [0.25, 0.75, 0])):
        mixed, tail = rules.mixture(own, nothing, other, nothing, eta)
        np.testing.assert_allclose(np.exp(np.asarray(mixed)), wanted, rtol=1e-12)
        assert float(tail) == NONE


def test_mixtures_of_a_batch_are_those_of_its_positions() -> None:
    rng = np.random.default_rng(0)
    own, other = np.log(rng.random((3, 4, 5)) / 5), np.log(rng.random((3, 4, 5)) / 5)
    own_tail, other_tail = np.log(rng.random((3, 4))), np.log(rng.random((3, 4)))
    mixed, tail = rules.mixture(own, own_tail, other, other_tail, 0.3)
    for i, j in np.ndindex(3, 4):
        alone, tail_alone = rules.mixture(
            own[i, j], own_tail[i, j], other[i, j], other_tail[i, j], 0.3
        )
        np.testing.assert_allclose(mixed[i, j], alone, rtol=1e-14)
        np.testing.assert_allclose(tail[i, j], tail_alone, rtol=1e-14)
