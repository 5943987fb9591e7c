"""Order statistics of a stream against `sorted`."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.targets.quantiles import MOST_DISTINCT, OrderStatistics

numbers = st.lists(
    st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1e308, -1e308]),
    min_size=1,
    max_size=60,
)
# four powers of two on either side: too many different numbers for 16, few enough for the claim
near_numbers = st.lists(st.floats(0.5, 7.999) | st.floats(-7.999, -0.5), min_size=17, max_size=120)
cuts = st.lists(st.integers(0, 120), max_size=6)


def counted(
    values: Sequence[float], cut_at: Iterable[int] = (), most_distinct: int = MOST_DISTINCT
) -> OrderStatistics:
    statistics = OrderStatistics(most_distinct)
    for batch in np.split(np.array(values, np.float64), sorted(cut_at)):
        statistics.add(batch)
    return statistics


def all_of(statistics: OrderStatistics) -> list[float]:
    return [statistics.at(place) for place in range(statistics.count)]


@settings(max_examples=150, deadline=None)
@given(values=numbers, cut_at=cuts)
def test_few_different_numbers_come_back_sorted_and_exact(
    values: list[float], cut_at: list[int]
) -> None:
    statistics = counted(values, cut_at)

    assert statistics.count == len(values)
    assert all_of(statistics) == sorted(values)
    assert statistics.relative_error == 0


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.5, -0.1, 0.0, 0.1, 3.0]), min_size=1, max_size=200),
    cut_at=cuts,
)
def test_many_numbers_of_few_values_are_exact(values: list[float], cut_at: list[int]) -> None:
    statistics = counted(values, cut_at, most_distinct=5)

    assert all_of(statistics) == sorted(values)
    assert statistics.relative_error == 0


@settings(max_examples=150, deadline=None)
@given(values=near_numbers, cut_at=cuts, seed=st.integers(0, 2**32 - 1))
def test_many_different_numbers_are_right_within_the_relative_error_whatever_their_order(
    values: list[float], cut_at: list[int], seed: int
) -> None:
    statistics = counted(values, most_distinct=16)
    found, error = all_of(statistics), statistics.relative_error

    assert error <= 0.5
    assert (error == 0) == (len(set(values)) <= 16)
    for value, wanted in zip(found, sorted(values), strict=True):
        assert abs(value - wanted) <= error * abs(wanted)
    shuffled = np.random.default_rng(seed).permutation(values).tolist()
    again = counted(shuffled, cut_at, most_distinct=16)
    assert (all_of(again), again.relative_error, again.count) == (found, error, len(values))


def test_the_relative_error_is_no_larger_than_it_must_be() -> None:
    values = np.linspace(1, 2, 16, endpoint=False).tolist()  # each sixteenth of the interval

    assert counted(values, most_distinct=16).relative_error == 0
    halves = counted([*values, 1 + 1 / 32], most_distinct=16)
    assert halves.relative_error == 1 / 32  # half of a sixteenth, of 1 at least
    eighths = counted([*values, 1 + 1 / 32], most_distinct=15)
    assert eighths.relative_error == 1 / 16
    assert all_of(eighths)[:4] == [1 + 1 / 16] * 3 + [1 + 3 / 16]


def test_asking_meanwhile_changes_nothing() -> None:
    values = np.random.default_rng(0).uniform(0.5, 4, 300)
    asked, unasked = OrderStatistics(16), OrderStatistics(16)
    for batch in np.split(values, 30):
        asked.add(batch)
        assert asked.at(0) <= asked.at(asked.count - 1)
        unasked.add(batch)

    assert all_of(asked) == all_of(unasked)


def test_a_median_of_many_numbers_is_exact_below_the_default_limit() -> None:
    values = np.random.default_rng(1).standard_normal(100_001)
    statistics = counted(values.tolist(), range(0, 100_001, 999))

    assert statistics.at(50_000) == sorted(values.tolist())[50_000]
    assert statistics.relative_error == 0


def test_zeros_of_either_sign_are_one_number_between_the_others() -> None:
    statistics = counted([0.0, 1.0, -0.0, -1.0, 5e-324, -5e-324, -0.0], most_distinct=5)

    assert all_of(statistics) == [-1.0, -5e-324, 0.0, 0.0, 0.0, 5e-324, 1.0]
    assert math.copysign(1, statistics.at(3)) == 1
    assert statistics.relative_error == 0


def test_a_zero_among_many_numbers_comes_back_as_next_to_nothing() -> None:
    """No relative error holds for 0: its neighbours are the smallest numbers there are."""
    values = [0.0, *np.linspace(1, 2, 40).tolist()]
    statistics = counted(values, most_distinct=16)

    assert statistics.relative_error > 0
    assert 0 <= statistics.at(0) < 1e-300


def test_infinities_are_exact_while_few_numbers_differ() -> None:
    """Beyond that they are lost: nothing that is counted here is infinite."""
    statistics = counted([math.inf, 1.0, -math.inf, 2.0, math.inf])

    assert all_of(statistics) == [-math.inf, 1.0, 2.0, math.inf, math.inf]


def test_single_precision_numbers_are_taken_as_they_are() -> None:
    statistics = OrderStatistics()
    statistics.add(np.array([0.1, -0.1], np.float32))

    assert all_of(statistics) == [-float(np.float32(0.1)), float(np.float32(0.1))]


def test_nothing_is_counted_as_nothing() -> None:
    statistics = OrderStatistics(4)
    assert (statistics.count, statistics.relative_error) == (0, 0.0)

    statistics.add(np.empty(0))
    assert (statistics.count, statistics.relative_error) == (0, 0.0)
    statistics.add(np.array([3.0]))
    statistics.add(np.empty(0))
    assert (statistics.count, statistics.at(0)) == (1, 3.0)


@pytest.mark.parametrize("place", [3, 100])
def test_a_place_that_is_not_there_is_an_error(place: int) -> None:
    with pytest.raises(IndexError):
        counted([1.0, 2.0, 2.0]).at(place)
