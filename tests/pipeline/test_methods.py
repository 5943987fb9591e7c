"""The table of methods against formulas written out here, in float64, from methods.md."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods import DEFAULT_METHOD, METHODS, choose, table

LOG_PROBS = [0.0, -1e-7, -0.1, -0.9162907, -2.3, -10.0, -23.1, -30.0, -100.0, -math.inf]
Formula = Callable[[float, dict[str, float]], float]


def gift(b: float, given: dict[str, float]) -> float:
    """γ of Q = softmax(log b + β·δ_y), from the two masses of that softmax, b floored at 1e-10."""
    floored = max(b, 1e-10)
    raised = floored * math.exp(given["beta"])
    # Q_y = raised/Z with Z = raised + 1 - b; everything else is shrunk by 1/Z = 1 - γ
    return 1 - 1 / (raised + 1 - floored)


# name, form, parameters, γ(b_y), s(b_y), where the rest goes
TABLE: list[tuple[str, str, dict[str, float], Formula, Formula, str]] = [
    ("sft", "frozen-target", {}, lambda b, _: 1, lambda b, _: 1, "observed"),
    ("dft", "frozen-target", {}, lambda b, _: b, lambda b, _: 1, "base"),
    ("dft", "frozen-weight", {}, lambda b, _: 1, lambda b, _: b, "observed"),
    *(
        (
            "sft+kl",
            "frozen-target",
            {"lam": lam},
            lambda b, p: 1 / (1 + p["lam"]),
            lambda b, p: 1 + p["lam"],
            "base",
        )
        for lam in (0.0, 0.1, 0.25, 1.0, 3.0, 1e6)
    ),
    *(
        (
            "label-smoothing",
            "frozen-target",
            {"lam": lam},
            lambda b, p: 1 - p["lam"],
            lambda b, p: 1,
            "uniform",
        )
        for lam in (0.0, 0.1, 0.25, 1.0)
    ),
    *(
        ("gift", "frozen-target", {"beta": beta}, gift, lambda b, _: 1, "base")
        for beta in (0.0, 0.5, 5.0, 20.0, 40.0, 500.0)
    ),
]


@pytest.mark.parametrize(("name", "form", "given", "trust", "scale", "residual"), TABLE)
def test_each_method_is_its_formula(
    name: str, form: str, given: dict[str, float], trust: Formula, scale: Formula, residual: str
) -> None:
    choice = choose(name, form, given)
    got_trust, got_weight = choice.trust_and_weight(np.array(LOG_PROBS))

    probs = [math.exp(log_prob) for log_prob in LOG_PROBS]
    assert choice.residual == residual
    assert choice.parameters == given
    np.testing.assert_allclose(got_trust, [trust(b, given) for b in probs], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(got_weight, [scale(b, given) for b in probs], rtol=1e-12)


def test_every_method_and_form_of_the_table_is_in_this_test() -> None:
    tested = {(name, form) for name, form, *_ in TABLE}

    assert tested == {(name, form) for name, method in METHODS.items() for form in method.forms}


@pytest.mark.parametrize(
    ("name", "form", "parameters"),
    [
        ("sft", "frozen-target", {}),
        ("dft", "frozen-target", {}),
        ("sft+kl", "frozen-target", {"lam": 0.1}),
        ("label-smoothing", "frozen-target", {"lam": 0.1}),
        ("gift", "frozen-target", {"beta": 20.0}),
    ],
)
def test_defaults_are_those_of_the_papers(
    name: str, form: str, parameters: dict[str, float]
) -> None:
    choice = choose(name)

    assert (choice.form, choice.parameters) == (form, parameters)


def test_the_default_method_without_a_teacher_is_sft_kl() -> None:
    assert DEFAULT_METHOD == "sft+kl"


@settings(max_examples=50, deadline=None)
@given(
    beta=st.floats(0, 30),
    spread=st.floats(0.1, 8),
    observed=st.integers(0, 49),
    seed=st.integers(0, 2**32 - 1),
)
def test_gift_is_the_softmax_of_the_prior_with_the_observed_token_raised(
    beta: float, spread: float, observed: int, seed: int
) -> None:
    logits = spread * np.random.default_rng(seed).standard_normal(50)
    base = np.exp(logits - np.logaddexp.reduce(logits))
    raised = np.log(base)
    raised[observed] += beta
    wanted = np.exp(raised - np.logaddexp.reduce(raised))

    trust, _ = choose("gift", given={"beta": beta}).trust_and_weight(np.log(base[[observed]]))
    target = (1 - trust) * base
    target[observed] += trust[0]

    if base[observed] >= 1e-10:
        np.testing.assert_allclose(target, wanted, rtol=1e-7, atol=1e-12)


def test_gift_takes_a_token_below_the_floor_for_one_at_the_floor() -> None:
    choice = choose("gift", given={"beta": 20.0})
    trust, _ = choice.trust_and_weight(np.log([1e-10, 1e-11, 1e-300]))

    # 1e-10·(e^20 - 1) = 0.0485165194..., and 0.0485165194/1.0485165194 = 0.0462716...
    np.testing.assert_allclose(trust, 0.0485165194 / 1.0485165194, rtol=1e-8)


def test_values_worked_out_by_hand() -> None:
    log_probs = np.log([0.5, 0.2])
    log_three = math.log(3)

    gift_trust, _ = choose("gift", given={"beta": log_three}).trust_and_weight(log_probs)
    kl_trust, kl_weight = choose("sft+kl", given={"lam": 0.25}).trust_and_weight(log_probs)

    np.testing.assert_allclose(gift_trust, [1 / 2, 2 / 7])  # 0.5·2/(1 + 0.5·2), 0.2·2/(1 + 0.2·2)
    np.testing.assert_allclose(kl_trust, [0.8, 0.8])
    np.testing.assert_allclose(kl_weight, [1.25, 1.25])


def test_a_frozen_weight_is_the_likelihood_times_the_trust() -> None:
    log_probs = np.log([1.0, 0.5, 0.01])
    target = choose("dft", "frozen-target")
    weight = choose("dft", "frozen-weight")

    trust, scale = target.trust_and_weight(log_probs)
    one, weights = weight.trust_and_weight(log_probs)

    assert one.tolist() == [1, 1, 1]
    np.testing.assert_allclose(weights, trust * scale)
    np.testing.assert_allclose(weights, [1.0, 0.5, 0.01])


all_choices = st.sampled_from(
    [(name, form) for name, method in METHODS.items() for form in method.forms]
)


@settings(max_examples=100, deadline=None)
@given(
    named=all_choices,
    log_probs=st.lists(st.floats(-1000, 0) | st.just(-math.inf), max_size=8),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=1),
)
def test_trust_lies_between_0_and_1_whatever_the_parameters(
    named: tuple[str, str], log_probs: list[float], shares: list[float]
) -> None:
    name, form = named
    given = {
        parameter.name: parameter.low + share * (parameter.high - parameter.low)
        for parameter, share in zip(METHODS[name].parameters, shares, strict=False)
    }
    trust, weight = choose(name, form, given).trust_and_weight(np.array(log_probs, np.float32))

    assert trust.shape == weight.shape == (len(log_probs),)
    assert trust.dtype == weight.dtype == np.float64
    assert np.all((trust >= 0) & (trust <= 1))
    assert np.all((weight >= 0) & np.isfinite(weight))


def test_stored_float32_log_probabilities_are_worked_on_in_float64() -> None:
    log_prob = np.array([-0.1], np.float32)
    trust, _ = choose("dft").trust_and_weight(log_prob)

    assert trust[0] == math.exp(float(log_prob[0]))


@pytest.mark.parametrize(
    ("name", "parameter", "low", "high"),
    [
        ("sft+kl", "lam", "0", "1e+06"),
        ("label-smoothing", "lam", "0", "1"),
        ("gift", "beta", "0", "500"),
    ],
)
@pytest.mark.parametrize("value", [-1e-9, 1e7, math.nan, math.inf, -math.inf])
def test_a_parameter_out_of_range_is_refused_with_the_range(
    name: str, parameter: str, low: str, high: str, value: float
) -> None:
    with pytest.raises(UserError) as refused:
        choose(name, given={parameter: value})

    assert str(refused.value) == (
        f"{name}: {parameter}={value:g} is out of range: give {low} to {high}"
    )


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as refused:
        choose("stf")

    assert str(refused.value).startswith("method 'stf' is not known: choose one of sft, dft, ")
    assert all(name in str(refused.value) for name in METHODS)


@pytest.mark.parametrize("name", ["", "SFT", "sft_kl", "sft "])
def test_a_method_has_one_spelling(name: str) -> None:
    with pytest.raises(UserError, match="is not known"):
        choose(name)


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"dft has no form 'live': choose one of frozen-target, fr"):
        choose("dft", "live")
    with pytest.raises(
        UserError, match=r"gift has no form 'frozen-weight': choose one of frozen-target$"
    ):
        choose("gift", "frozen-weight")


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"gift has no parameter 'lam': its parameters: beta"):
        choose("gift", given={"lam": 0.1})
    with pytest.raises(UserError, match=r"sft has no parameter 'lam': its parameters: none"):
        choose("sft", given={"lam": 0.1})


def test_a_whole_number_is_the_same_parameter_as_its_float() -> None:
    assert repr(choose("gift", given={"beta": 5}).parameters) == "{'beta': 5.0}"


def test_choosing_does_not_keep_hold_of_what_was_given() -> None:
    given = {"beta": 5.0}
    choice = choose("gift", given=given)
    given["beta"] = 7.0

    assert choice.parameters == {"beta": 5.0}
    assert choose("gift").parameters == {"beta": 20.0}


def test_the_table_in_words_has_a_row_for_each_method() -> None:
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in table()}

    assert list(rows) == list(METHODS)
    assert rows["gift"]["parameters"] == "beta=20"
    assert rows["dft"]["forms"] == "frozen-target, frozen-weight"
    assert [rows[name]["residual"] for name in ("sft", "gift", "label-smoothing")] == [
        "-",
        "b",
        "1/V",
    ]
    assert rows["sft+kl"]["scale"] == "1+lam"
