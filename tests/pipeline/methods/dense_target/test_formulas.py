"""Dense targets against the formulas, written out position by position."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from qpipe.pipeline.methods.table import choices, dense_target
from qpipe.tests.support.methods import (
    DEFAULTS,
    FACTS,
    FORMULAS,
    VARIANTS,
    Parameters,
    Token,
    idft_trust,
    iw_sft,
    p_y,
)

from .cases import CASES, LIBRARIES, Case
from .formulas import expected, tokens_of
from .losses import LOSSES


def test_every_method_in_every_form_is_in_these_tests() -> None:
    tested = {(choice.method.name, choice.form) for choice in choices()}

    assert set(FACTS) == tested
    assert len(tested) == 75
    assert {*FORMULAS, "gem"} == set(DEFAULTS) == set(LOSSES) == {name for name, _ in tested}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), FACTS)
def test_the_target_and_the_scale_are_those_of_the_formula(
    name: str, form: str, library: str
) -> None:
    for case in CASES:
        for given_parameters in [{}, *VARIANTS.get(name, [])]:
            target, scale = case.in_library(library).target(name, form, given_parameters)
            wanted_target, wanted_scale = expected(case, name, form, given_parameters)

            assert type(target) is type(scale) is type(case.in_library(library).student)
            assert target.dtype == scale.dtype == case.in_library(library).student.dtype
            assert scale.shape == case.observed.shape
            np.testing.assert_allclose(
                target, wanted_target, 1e-10, 1e-14, err_msg=f"{given_parameters}"
            )
            np.testing.assert_allclose(
                scale, wanted_scale, 1e-10, 1e-14, err_msg=f"{given_parameters}"
            )


def test_the_cases_reach_both_sides_of_every_switch() -> None:
    """Else the test above would not tell one side from the other."""

    def seen(name: str, place: int) -> list[float]:
        return [
            FORMULAS[name](token, DEFAULTS[name])[place]
            for case in CASES
            for example in tokens_of(case, "live")
            for token in example
        ]

    for name in ("profit", "stm", "token-cleaning", "prift-mass"):
        assert {0.0, 1.0} == set(seen(name, 0)), name
    for name in ("contrast", "se-kd", "tip"):
        assert set(seen(name, 2)) == {0.0, 1.0}, name
    assert min(seen("talr", 0)) == 0.01
    assert min(seen("infosft", 2)) == 0.0
    assert 0.5 <= min(seen("ranktuner", 2)) < 1 < max(seen("ranktuner", 2)) < 2
    assert min(seen("psft", 2)) == 0.0 < 1.0 < max(seen("psft", 2))
    assert max(seen("trsft", 0)) == 1.0 > min(seen("trsft", 0))
    clamped = [iw_sft(replace(t, log_ratio=3.0), DEFAULTS["iw-sft"])[2] for t in any_tokens(1)]
    assert clamped == [16.0]
    powers = [
        idft_trust(token, {"beta": 1})
        for case in CASES
        for row in tokens_of(case, "live")
        for token in row
    ]
    squares = [
        p_y(token) ** 2 for case in CASES for row in tokens_of(case, "live") for token in row
    ]
    assert 0 < sum(map(math.isclose, powers, squares)) < len(powers)


def any_tokens(count: int) -> list[Token]:
    return [token for row in tokens_of(CASES[2], "live") for token in row][:count]


def sequence(base_y: list[float], ratios: list[float]) -> Case:
    """One example over three tokens; the student gives y the base's share times a ratio."""

    def model(shares: np.ndarray) -> np.ndarray:
        return np.log(np.stack([shares, (1 - shares) * 0.25, (1 - shares) * 0.75], -1))[None]

    base = np.array(base_y)
    student = model(base * np.array(ratios))
    observed = np.zeros((1, len(base_y)), np.int64)
    return Case(student, model(base), model(base), observed, np.ones((1, len(base_y))))


@pytest.mark.parametrize(
    ("ratios", "given_parameters", "weight"),
    [
        ([2.0, 8.0], {}, 4.0),
        ([2.0, 8.0], {"T": 0.5}, 2.0),
        ([2.0, 8.0], {"T": 2}, 16.0),
        ([4.0, 8.0], {"T": 2}, 16.0),  # e^(T·mean) = 32
        ([0.25, 0.25], {"T": 2}, 1 / 16),
        ([1.0, 1.0], {}, 1.0),
    ],
)
def test_iw_sft_weighs_an_example_by_its_mean_log_ratio_and_by_16_at_most(
    ratios: list[float], given_parameters: Parameters, weight: float
) -> None:
    case = sequence([0.1, 0.01], ratios)
    target, scale = case.target("iw-sft", "live", given_parameters)

    np.testing.assert_allclose(scale, [[weight, weight]], rtol=1e-12)
    assert target[0].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_iw_sft_takes_its_mean_over_each_example_alone() -> None:
    first, second = sequence([0.1, 0.1], [2.0, 2.0]), sequence([0.1, 0.1], [3.0, 3.0])
    both = Case(
        *(
            np.concatenate(pair)
            for pair in zip(vars(first).values(), vars(second).values(), strict=True)
        )
    )
    _, scale = both.target("iw-sft", "live", {})

    np.testing.assert_allclose(scale, [[2, 2], [3, 3]], rtol=1e-12)


def test_psft_keeps_a_ratio_up_to_its_limit_and_none_above() -> None:
    ratios = [0.01, 0.5, 1.0, 1.27999, 1.28001, 5.0]
    case = sequence([0.1] * 6, ratios)
    _, scale = case.target("psft", "live", {})
    _, tighter = case.target("psft", "live", {"eps_hi": 0.2})

    np.testing.assert_allclose(scale, [[0.01, 0.5, 1.0, 1.27999, 0, 0]], rtol=1e-12)
    np.testing.assert_allclose(tighter, [[0.01, 0.5, 1.0, 0, 0, 0]], rtol=1e-12)


def test_eaft_reads_the_twenty_most_probable_tokens_alone() -> None:
    """A flat head of 20 tokens has an entropy of log 20, whatever is below it."""
    probs = np.array([0.04] * 20 + [0.2 / 40] * 40)
    log_probs = np.log(np.random.default_rng(0).permutation(probs))[None]
    observed = np.array([int(np.argmax(log_probs))])
    target, _ = dense_target("eaft", student_log_probs=log_probs, observed=observed)

    trust = math.log(20) / 3
    assert target[0, observed[0]] == pytest.approx(trust + (1 - trust) * 0.04, rel=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), FACTS)
def test_float32_stays_float32(name: str, form: str, library: str) -> None:
    case = CASES[5]
    single = Case(
        *(
            value.astype(np.float32) if value.dtype == float else value
            for value in vars(case).values()
        )
    )
    wide = Case(
        *(
            value.astype(float) if value.dtype == np.float32 else value
            for value in vars(single).values()
        )
    )
    target, scale = single.in_library(library).target(name, form, {})
    wanted_target, wanted_scale = expected(wide, name, form, {})

    assert target.dtype == scale.dtype == single.in_library(library).student.dtype
    np.testing.assert_allclose(target, wanted_target, 2e-4, 1e-6)
    np.testing.assert_allclose(scale, wanted_scale, 2e-4, 1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "beta",
    [80.0, 89.0, 150.0, 500.0],
)
def test_gift_in_float32_takes_every_beta_that_it_allows(beta: float, library: str) -> None:
    """e^β is more than float32 holds from β = 88.8 on; the trust is 1 there for any b_y."""
    base = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    with np.errstate(all="ignore"):
        target, _ = dense_target(
            "gift",
            base_log_probs=base if library == "numpy" else torch.from_numpy(base),
            observed=np.array([1]),
            beta=beta,
        )

    np.testing.assert_allclose(target, [[0, 1, 0]], atol=1e-6)
