"""Rules against formulas written out here."""

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

from .arrays import LIBRARIES, NONE, as_array, random_log_probs, seeds

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
