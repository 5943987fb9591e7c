"""Rules against formulas written out here, and the error bound of a truncated mixture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.methods import rules
from qpipe.pipeline.methods.rules import Signals
from qpipe.pipeline.methods.table import METHODS, choices, choose

NONE = -math.inf
LIBRARIES = ("numpy", "torch")
seeds = st.integers(0, 2**32 - 1)


def as_array(values: Any, library: str = "numpy") -> Any:
    array = np.asarray(values, float)
    return array if library == "numpy" else torch.from_numpy(array)


def random_log_probs(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    logits = spread * rng.standard_normal(size)
    return logits - np.logaddexp.reduce(logits)


def log_of_sum(values: np.ndarray) -> float:
    """log Σ exp, −∞ of none."""
    return float(np.logaddexp.reduce(values)) if len(values) else NONE


# The geometric mixture on a support.


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


# Contrast, gem, and the sums over a vocabulary.


@pytest.mark.parametrize("library", LIBRARIES)
def test_contrast_worked_out_by_hand(library: str) -> None:
    """At 0.2 of 0.5 and above stand the first three; their ratios are 2, 0.5 and 0.5."""
    expert = as_array(np.log([0.5, 0.3, 0.11, 0.09]), library)
    amateur = as_array(np.log([0.25, 0.6, 0.22, 0.03]), library)
    target = rules.contrast(expert, amateur, 0.2)

    np.testing.assert_allclose(np.exp(np.asarray(target)), [2 / 3, 1 / 6, 1 / 6, 0], rtol=1e-12)
    assert rules.contrast_head(expert, 0.2).tolist() == [True, True, True, False]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_head_of_a_contrast_is_as_high_as_its_edge_or_higher(library: str) -> None:
    expert = as_array(np.log([0.5, 0.25, 0.125, 0.125 - 1e-9]), library)

    assert rules.contrast_head(expert, 0.25).tolist() == [True, True, True, False]
    assert rules.contrast_head(expert, 1.0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_pull_of_gem_worked_out_by_hand(library: str) -> None:
    """At β = 1/2 the shares 0.1, 0.3, 0.6 are squared: 0.01, 0.09, 0.36 of 0.46."""
    log_probs = as_array(np.log([0.1, 0.3, 0.6]), library)
    is_observed = as_array([0, 1, 0], library) == 1
    linear = rules.matching_gradient(log_probs, is_observed, 0.5, "linear")
    # σ(0.01·log(1/3)), σ(0) and σ(0.01·log 2)
    sigmoids = [3**-0.01 / (1 + 3**-0.01), 0.5, 2**0.01 / (1 + 2**0.01)]
    pull = np.array([1, 9, 36]) / 46 * sigmoids
    sigmoid = rules.matching_gradient(log_probs, is_observed, 0.5, "logsigmoid")

    np.testing.assert_allclose(linear, [1 / 46, -37 / 46, 36 / 46], rtol=1e-12)
    np.testing.assert_allclose(sigmoid, pull - [0, pull.sum(), 0], rtol=1e-12)
    np.testing.assert_allclose(
        rules.matching_weights(log_probs, is_observed, 0.5, "logsigmoid"), pull, rtol=1e-12
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_sums_over_a_vocabulary_worked_out_by_hand(library: str) -> None:
    half = as_array([math.log(0.5), math.log(0.5), NONE], library)
    quarter = as_array([math.log(0.25), math.log(0.25), math.log(0.5)], library)
    nothing = as_array([NONE, NONE, NONE], library)
    with np.errstate(all="ignore"):
        assert float(rules.entropy(half)) == pytest.approx(math.log(2), rel=1e-12)
        assert float(rules.entropy(quarter)) == pytest.approx(1.5 * math.log(2), rel=1e-12)
        assert float(rules.renormalised_entropy(quarter - 5)) == pytest.approx(
            1.5 * math.log(2), rel=1e-12
        )
        assert float(rules.divergence(half, quarter)) == pytest.approx(math.log(2), rel=1e-12)
        assert float(rules.divergence(quarter, half)) == math.inf
        assert float(rules.divergence(half, half)) == 0
        assert float(rules.log_sum_exp(half)) == pytest.approx(0, abs=1e-15)
        assert float(rules.log_sum_exp(quarter - 2000)) == pytest.approx(-2000, rel=1e-12)
        assert float(rules.log_sum_exp(quarter + 2000)) == pytest.approx(2000, rel=1e-12)
        assert float(rules.log_sum_exp(nothing)) == NONE


@settings(max_examples=300, deadline=None)
@given(seed=seeds, size=st.integers(1, 60), spread=st.floats(0, 300))
def test_an_entropy_is_between_nothing_and_the_log_of_the_size(
    seed: int, size: int, spread: float
) -> None:
    """Below 0 a power of it would have no value."""
    logits = spread * np.random.default_rng(seed).standard_normal(size)
    for dtype in (np.float32, np.float64):
        entropy = rules.renormalised_entropy(logits.astype(dtype))
        assert 0 <= entropy <= math.log(size) * (1 + 1e-6) + 1e-6


# Rules of one position at a time.

HALF, FIFTH, TENTH = math.log(0.5), math.log(0.2), math.log(0.1)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("name", "given_parameters", "signals", "trust", "scale"),
    [
        ("sft", {}, {"log_prob": [HALF, NONE]}, [1, 1], [1, 1]),
        ("dft", {}, {"log_prob": [HALF, NONE, 0.0]}, [0.5, 0, 1], [1, 1, 1]),
        ("beyond-log", {"alpha": 2}, {"log_prob": [HALF, NONE, 0.0]}, [0.25, 0, 1], [1, 1, 1]),
        ("profit", {}, {"log_prob": [HALF, TENTH, TENTH - 1e-9]}, [1, 1, 0], [1, 1, 1]),
        ("profit", {"tau": 1}, {"log_prob": [0.0, -1e-9]}, [1, 0], [1, 1]),
        ("eaft", {"a": 2}, {"top_entropy": [1.5, 0.0]}, [0.25, 0], [1, 1]),
        ("eaft", {"a": 0}, {"top_entropy": [1.5, 0.0]}, [1, 1], [1, 1]),
        ("iw-sft", {}, {"sequence_log_ratio": [0.0, -HALF, 9.0, NONE]}, [1] * 4, [1, 2, 16, 0]),
        ("cft", {}, {"mask": [0.0, 0.5, 1.0]}, [0, 0.5, 1], [1, 1, 1]),
        ("label-smoothing", {}, {"log_prob": [HALF]}, [0.9], [1]),
        ("sft+kl", {"lam": 0.25}, {"log_prob": [HALF]}, [0.8], [1.25]),
        ("asft", {"lam": 0.5}, {"log_prob": [HALF, NONE]}, [0.5, 0], [1, 0.5]),
        (
            "psft",
            {"eps_hi": 1},
            {"log_prob": [HALF, HALF, FIFTH, NONE], "base_log_prob": [FIFTH, HALF, HALF, HALF]},
            [1] * 4,
            [0, 1, 0.4, 0],
        ),
        ("gem", {}, {"log_prob": [HALF]}, [1], [1]),
        ("kd", {}, {"log_prob": [HALF]}, [0], [1]),
        ("kd-hybrid", {"lam": 0.25}, {"log_prob": [HALF]}, [0.75], [1]),
        ("target-sft", {}, {"log_prob": [HALF, NONE]}, [0.5, 0], [1, 1]),
        # 0.5·2/(1 + 0.5·2), 0.2·2/(1 + 0.2·2)
        ("gift", {"beta": math.log(3)}, {"base_log_prob": [HALF, FIFTH]}, [1 / 2, 2 / 7], [1, 1]),
        ("flow", {"tau": 0.5}, {"base_log_prob": [HALF, NONE, 0.0]}, [0.25, 0, 1], [1, 1, 1]),
        ("stm", {"tau": 0.2}, {"base_log_prob": [HALF, FIFTH, TENTH]}, [1, 1, 0], [1, 1, 1]),
        (
            "token-cleaning",
            {"threshold": 1},
            {"base_log_prob": [-2.0, -2.0, -2.0], "teacher_log_prob": [-0.5, -1.0, -1.5]},
            [1, 1, 0],
            [1, 1, 1],
        ),
        ("contrast", {}, {"divergence": [0.39, 0.4, math.inf]}, [0, 0, 0], [0, 1, 1]),
        # −(log ½ + log 2) = 0: p¹; −(log 0.1 + 0)/1 = 2.3: p²; −(log ½ + 5) = −4.3: p^0.1
        (
            "idft",
            {},
            {"log_prob": [HALF, TENTH, HALF], "entropy": [math.log(2), 0.0, 5.0]},
            [0.5, 0.01, 0.5**0.1],
            [1, 1, 1],
        ),
        ("trsft", {"tau": 0.4}, {"log_prob": [HALF, FIFTH, NONE]}, [1, 0.5, 0], [1, 1, 1]),
        ("prift-prob", {}, {"base_log_prob": [HALF, NONE]}, [0.5, 0], [1, 1]),
        ("prift-mass", {}, {"base_mass": [0.49, 0.5, 1.0]}, [0, 1, 1], [1, 1, 1]),
        # at ½ the log-odds are 0, at P the weight ends, and at 1 − P it is p·2
        (
            "infosft",
            {"P": 0.9},
            {"log_prob": [HALF, math.log(0.9), 0.0, TENTH, NONE]},
            [1] * 5,
            [0.5, 0, 0, 0.2, 0],
        ),
        (
            "deft",
            {},
            {"log_prob": [HALF, HALF, 0.0, NONE], "concentration": [1.0, 0.5, 1.0, 0.1]},
            [0.5, 0.5**0.5, 1, 0],
            [1] * 4,
        ),
        ("talr", {"tau": 2}, {"log_prob": [HALF, -20.0, NONE]}, [0.5**0.5, 0.01, 0.01], [1] * 3),
        (
            "ranktuner",
            {"power": 2},
            {
                "log_prob": [0.0, HALF, HALF, NONE],
                "rank": [1.0, 3.0, 7.0, 7.0],
                "expected_rank": [3.0, 1.0, 3.0, 7.0],
            },
            [1] * 4,
            [0.5**0.5, 2**0.5 / 4, 2 ** (1 / 6) / 4, 0],
        ),
        ("se-kd", {"threshold": 1}, {"base_entropy": [0.9, 1.0, 2.0]}, [0] * 3, [0, 1, 1]),
        (
            "tip",
            {"threshold": 1},
            {"base_entropy": [0.4, 0.5, 0.0], "divergence": [0.5, 0.5, math.inf]},
            [0] * 3,
            [0, 1, 1],
        ),
        ("amid", {}, {"log_prob": [HALF]}, [0], [1]),
    ],
)
def test_trust_and_scale_worked_out_by_hand(
    name: str,
    given_parameters: dict[str, float],
    signals: dict[str, list[float]],
    trust: list[float],
    scale: list[float],
    library: str,
) -> None:
    read = Signals(**{key: as_array(values, library) for key, values in signals.items()})
    got_trust, got_scale = choose(name, "live", given_parameters).trust_and_scale(read)

    np.testing.assert_allclose(got_trust, trust, 1e-10, 1e-14)
    np.testing.assert_allclose(got_scale, scale, 1e-10, 1e-14)


def test_gift_takes_a_token_below_the_floor_for_one_at_the_floor() -> None:
    read = Signals(base_log_prob=np.array([math.log(1e-10), math.log(1e-11), -700.0, NONE]))
    trust, _ = choose("gift", given={"beta": 20.0}).trust_and_scale(read)

    # 1e-10·(e^20 − 1) = 0.0485165194..., and 0.0485165194/1.0485165194 = 0.0462716...
    np.testing.assert_allclose(trust, 0.0485165194 / 1.0485165194, rtol=1e-8)


@settings(max_examples=200, deadline=None)
@given(
    beta=st.floats(0, 30),
    spread=st.floats(0.1, 8),
    observed=st.integers(0, 49),
    seed=seeds,
)
def test_gift_is_the_softmax_of_the_prior_with_the_observed_token_raised(
    beta: float, spread: float, observed: int, seed: int
) -> None:
    base = random_log_probs(np.random.default_rng(seed), 50, spread)
    raised = base.copy()
    raised[observed] += beta
    wanted = np.exp(raised - np.logaddexp.reduce(raised))

    read = Signals(base_log_prob=base[[observed]])
    trust, _ = choose("gift", given={"beta": beta}).trust_and_scale(read)
    target = (1 - trust) * np.exp(base)
    target[observed] += trust[0]

    if base[observed] >= math.log(1e-10):
        np.testing.assert_allclose(target, wanted, rtol=1e-7, atol=1e-12)


# Every method over every allowed parameter.

log_probs = st.floats(-1000, 0) | st.just(NONE) | st.just(0.0) | st.just(-0.0)
SIGNALS: dict[str, st.SearchStrategy[float]] = {
    "log_prob": log_probs,
    "base_log_prob": log_probs,
    "teacher_log_prob": log_probs,
    "entropy": st.floats(0, 12),
    "top_entropy": st.floats(0, math.log(20)),
    "sequence_log_ratio": st.floats(-1000, 1000),
    "divergence": st.floats(0, 100) | st.just(math.inf),
    "mask": st.floats(0, 1),
    "concentration": st.floats(1e-6, 1),
    "rank": st.floats(1, 1e6),
    "expected_rank": st.floats(1, 1e6),
    "base_mass": st.floats(0, 1),
    "base_entropy": st.floats(0, 12),
}
# of the methods that take a parameter from the data
SETTLED: dict[str, dict[str, Any]] = {
    **{name: {"tau": 2.0} for name in ("flow", "talr")},
    **{name: {"threshold": 0.0} for name in ("token-cleaning", "se-kd", "tip")},
}


@st.composite
def allowed_parameters(draw: st.DrawFn, name: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for parameter in METHODS[name].parameters:
        if parameter.words:
            chosen[parameter.name] = draw(st.sampled_from(parameter.words))
            continue
        low, high = parameter.low, parameter.high
        if parameter.above:
            low = math.nextafter(low, math.inf)
        edges = st.sampled_from([low, high])
        chosen[parameter.name] = draw(edges | st.floats(low, high))
    return chosen


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", list(METHODS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_trust_is_between_0_and_1_and_a_scale_finite_for_all_allowed_parameters(
    name: str, library: str, data: st.DataObject
) -> None:
    choice = choose(name, "live", data.draw(allowed_parameters(name)))
    positions = data.draw(
        st.lists(st.fixed_dictionaries(SIGNALS), min_size=0, max_size=5), label="positions"
    )
    columns = {key: [position[key] for position in positions] for key in SIGNALS}
    read = Signals(
        **{
            key: as_array(values, library)
            for key, values in columns.items()
            if key in choice.method.reads or (not choice.method.reads and key == "log_prob")
        }
    )
    with np.errstate(all="ignore"):
        trust, scale = (np.asarray(array) for array in choice.trust_and_scale(read))

    assert trust.shape == scale.shape == (len(positions),)
    assert trust.dtype == scale.dtype == np.float64
    assert np.all((trust >= 0) & (trust <= 1))
    assert np.all((scale >= 0) & np.isfinite(scale))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_rule_keeps_the_precision_of_what_it_reads(name: str) -> None:
    for dtype in (np.float32, np.float64):
        values = {key: np.array([0.25, 0.5], dtype) for key in SIGNALS}
        values |= {key: -array for key, array in values.items() if key.endswith("log_prob")}
        choice = choose(name, "live", SETTLED.get(name))
        for library in (lambda array: array, torch.from_numpy):
            read = Signals(**{key: library(array) for key, array in values.items()})
            for got in (*choice.trust_and_scale(read), *choice.trust_and_weight(read)):
                assert got.dtype == read.log_prob.dtype


def test_a_weight_is_the_scale_times_the_trust_and_stands_beside_a_whole_trust() -> None:
    values = {
        key: np.array([0.3, 0.2]) if not key.endswith("log_prob") else np.log([0.3, 0.6])
        for key in SIGNALS
    }
    signals = Signals(**values)
    seen = set()
    for choice in choices():
        choice = choose(choice.method.name, choice.form, SETTLED.get(choice.method.name))
        trust, scale = choice.trust_and_scale(signals)
        got_trust, got_weight = choice.trust_and_weight(signals)
        seen.add(choice.is_weight)
        if choice.is_weight:
            assert got_trust.tolist() == [1, 1]
            np.testing.assert_allclose(got_weight, scale * trust, rtol=1e-15)
        else:
            np.testing.assert_array_equal(got_trust, trust)
            np.testing.assert_array_equal(got_weight, scale)
    assert seen == {True, False}


def test_a_frozen_weight_is_the_likelihood_times_the_trust() -> None:
    signals = Signals(log_prob=np.log([1.0, 0.5, 0.01]))
    one, weights = choose("dft", "frozen-weight").trust_and_weight(signals)

    assert one.tolist() == [1, 1, 1]
    np.testing.assert_allclose(weights, [1.0, 0.5, 0.01])
