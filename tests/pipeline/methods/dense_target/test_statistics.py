"""Trusts that depend on the whole data set: flow's median, token-cleaning's share."""

import math

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError

from .cases import CASES, LIBRARIES, Case, Parameters


def flow_case(probs: list[float]) -> Case:
    """One token a row, of which the base gives the observed one these probabilities."""
    log_probs = np.log([[[prob, 1 - prob]] for prob in probs])
    observed = np.zeros((len(probs), 1), np.int64)
    return Case(log_probs, log_probs, log_probs, observed, np.ones(observed.shape))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("exponents", "median"),
    [
        ([3], 3),
        ([5, 1], 3),
        ([1, 7, 2], 2),
        ([8, 1, 2, 3], 2.5),
        ([2, 2, 2, 9], 2),
        ([9, 1, 8, 2, 7], 7),
        ([1, 2, 4, 8, 16, 32], 6),
    ],
)
def test_flow_raises_to_one_over_the_median_loss_of_the_data(
    exponents: list[int], median: float, library: str
) -> None:
    """At losses of k·log 2 and a median of m·log 2, b_y^(1/τ) is e^(−k/m)."""
    case = flow_case([2.0**-k for k in exponents]).in_library(library)
    _, scale = case.target("flow", "frozen-weight", {})

    wanted = [[math.exp(-k / median)] for k in exponents]
    np.testing.assert_allclose(scale, wanted, rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_explicit_tau_stands_above_the_median(library: str) -> None:
    case = flow_case([0.5, 0.25, 0.125]).in_library(library)
    _, scale = case.target("flow", "frozen-weight", {"τ": 0.5})

    np.testing.assert_allclose(scale, [[0.25], [0.0625], [0.015625]], rtol=1e-12)


def test_flow_on_data_of_which_the_base_is_certain_asks_for_another_tau() -> None:
    """A median of 0 leaves 1/τ without a value."""
    log_probs = np.array(
        [[[0.0, -math.inf]], [[0.0, -math.inf]], [[-0.5, math.log1p(-math.exp(-0.5))]]]
    )
    case = Case(log_probs, log_probs, log_probs, np.zeros((3, 1), np.int64), None)

    with pytest.raises(UserError, match=r"^flow: tau=0 is out of range: give above 0"):
        case.target("flow", "frozen-weight", {})
    _, scale = case.target("flow", "frozen-weight", {"tau": 1})
    np.testing.assert_allclose(scale, [[1], [1], [math.exp(-0.5)]], rtol=1e-12)


def cleaning_case(excesses: list[float]) -> Case:
    """One token a row; the teacher's log-probability of it exceeds the base's by so much."""
    base = np.log([[[0.25, 0.75]]] * len(excesses))
    teacher = base.copy()
    teacher[:, 0, 0] += excesses
    observed = np.zeros((len(excesses), 1), np.int64)
    return Case(base, base, teacher, observed, np.ones(observed.shape))


def kept(case: Case, given_parameters: Parameters) -> list[int]:
    """The places of the tokens that count."""
    _, scale = case.target("token-cleaning", "frozen-weight", given_parameters)
    values = np.asarray(scale)[:, 0]
    assert set(values.tolist()) <= {0.0, 1.0}
    return np.flatnonzero(values).tolist()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64, 100])
@pytest.mark.parametrize("keep", [0, 0.01, 0.29, 0.3, 0.5, 0.6, 0.7, 0.999, 1])
def test_token_cleaning_keeps_as_many_tokens_as_the_authors_do(
    count: int, keep: float, library: str
) -> None:
    excesses = np.random.default_rng(count).permutation(count) / 8 - 2
    authors = np.argsort(-excesses)[: int(count * keep)]
    case = cleaning_case(excesses.tolist()).in_library(library)

    assert kept(case, {"keep": keep}) == sorted(authors.tolist())


def test_token_cleaning_keeps_every_token_as_high_as_the_last_one_kept() -> None:
    """Half of six are three, but the third is one of three alike."""
    excesses = [0.5, -1.0, 0.5, 2.0, 0.5, 1.0]

    assert kept(cleaning_case(excesses), {"keep": 0.5}) == [0, 2, 3, 4, 5]
    assert kept(cleaning_case(excesses), {"keep": 0.34}) == [3, 5]


def test_token_cleaning_keeps_60_percent_where_nothing_is_said() -> None:
    assert kept(cleaning_case([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), {}) == [4, 5, 6, 7, 8, 9]


def test_an_explicit_threshold_stands_above_what_is_to_be_kept() -> None:
    case = cleaning_case([-0.5, 0.25, 0.75, 1.5])

    assert kept(case, {"threshold": 0.5}) == [2, 3]
    assert kept(case, {"threshold": 0.5, "keep": 0}) == [2, 3]
    assert kept(case, {"threshold": 0.5, "keep": 1}) == [2, 3]
    assert kept(case, {"threshold": -1}) == [0, 1, 2, 3]
    assert kept(case, {"threshold": 9}) == []


def test_the_statistic_is_that_of_all_examples_together() -> None:
    """Cut into examples in another way, the same tokens have the same trusts."""
    case = CASES[3]
    as_one = Case(*(value.reshape(1, -1, *value.shape[2:]) for value in vars(case).values()))
    for name in ("flow", "token-cleaning"):
        _, scale = case.target(name, "frozen-weight", {})
        _, scale_as_one = as_one.target(name, "frozen-weight", {})
        np.testing.assert_array_equal(scale.reshape(-1), scale_as_one[0])
