"""What is made of two ragged supports, against plain loops over dense distributions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.targets.distributions import (
    Supports,
    common_divergence,
    common_supports,
    contrasted,
    mixture,
)

from .known import (
    Known,
    Probs,
    Row,
    assert_rows,
    outside,
    random_probs,
    rows_of,
    seeds,
    spreads,
    supports_of,
    vocab_sizes,
)

# Two distributions on their common ids.


def random_pair(
    rng: np.random.Generator, positions: int, size: int, spread: float, share: float
) -> tuple[list[Known], list[Known]]:
    """Two distributions of each position, known at ids of their own in any order, and observed."""

    def known(observed: int) -> Known:
        count = int(rng.integers(1, max(2, round(share * size)) + 1))
        ids = rng.permutation(size)[:count].tolist()
        return Known(random_probs(rng, size, spread, bool(rng.integers(2))), ids, observed)

    observed = rng.integers(0, size, positions).tolist()
    return [known(each) for each in observed], [known(each) for each in observed]


def supports_of_pair(pair: tuple[list[Known], list[Known]]) -> tuple[Supports, Supports]:
    one, other = pair
    return supports_of([row.support() for row in one]), supports_of(
        [row.support() for row in other]
    )


pairs = given(
    seed=seeds,
    positions=st.integers(0, 6),
    size=vocab_sizes,
    spread=spreads,
    share=st.sampled_from([0.1, 0.5, 1.0]),
)


@settings(max_examples=200, deadline=None)
@pairs
def test_common_supports_are_the_ids_of_both_in_the_order_of_the_first(
    seed: int, positions: int, size: int, spread: float, share: float
) -> None:
    one, other = random_pair(np.random.default_rng(seed), positions, size, spread, share)
    common = common_supports(*supports_of_pair((one, other)))

    both = [
        [token for token in left.all_ids if token in right.all_ids]
        for left, right in zip(one, other, strict=True)
    ]
    for found, known in ((common.first, one), (common.second, other)):
        wanted = [
            Row({token: row.probs[token] for token in ids}, outside(row.probs, ids))
            for row, ids in zip(known, both, strict=True)
        ]
        assert_rows(found, wanted)


def test_with_nothing_in_common_but_the_observed_token_the_rest_is_tail() -> None:
    one = supports_of([Row({0: 0.5, 1: 0.25, 9: 0.125}, 0.125)])
    other = supports_of([Row({9: 0.0625, 4: 0.5, 5: 0.25}, 0.1875)])
    common = common_supports(one, other)

    assert_rows(common.first, [Row({9: 0.125}, 0.875)])
    assert_rows(common.second, [Row({9: 0.0625}, 0.9375)])


def test_a_common_tail_far_below_the_resolution_of_1_is_exact() -> None:
    one = supports_of([Row({0: 1.0, 1: 1e-20, 2: 2e-20, 3: 4e-20}, 1e-21)])
    other = supports_of([Row({3: 0.5, 0: 0.25}, 0.25)])
    common = common_supports(one, other)

    assert_rows(common.first, [Row({0: 1.0, 3: 4e-20}, 3.1e-20)])
    assert_rows(common.second, [Row({0: 0.25, 3: 0.5}, 0.25)])


@pytest.mark.parametrize("largest", [300, 2**20, 2**22, 2**28, 2**31 - 1])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_ids_of_any_size_are_matched(largest: int, size: int) -> None:
    rng = np.random.default_rng(size)
    ids = [*rng.choice(min(largest, 10**6), 2 * size, replace=False).tolist(), largest]
    left = [*ids[:size], largest]
    right = [largest, *ids[size // 2 : size // 2 + size]]
    rows = [{0: 0.5}, dict.fromkeys(left, 0.1), dict.fromkeys(left, 0.1)]
    others = [{0: 0.5}, dict.fromkeys(right, 0.1), {largest: 0.5}]
    common = common_supports(
        supports_of([Row(row) for row in rows]), supports_of([Row(row) for row in others])
    )

    wanted = [[0], [token for token in left if token in right], [largest]]
    assert [list(row.entries) for row in rows_of(common.first)] == wanted
    assert [list(row.entries) for row in rows_of(common.second)] == wanted


# What is made of two distributions.


def both_on_common(one: Known, other: Known) -> tuple[Row, Row]:
    ids = [token for token in one.all_ids if token in other.all_ids]
    first, second = (
        Row({token: row.probs[token] for token in ids}, outside(row.probs, ids))
        for row in (one, other)
    )
    return first, second


def wanted_mixture(first: Row, second: Row, eta: float) -> Row:
    """∝ p^(1−η)·q^η of each entry and of the tails, as methods.md has it."""
    entries = {
        token: prob ** (1 - eta) * second.entries[token] ** eta
        for token, prob in first.entries.items()
    }
    tail = first.tail ** (1 - eta) * second.tail**eta if first.tail or second.tail else 0.0
    total = math.fsum([*entries.values(), tail])
    return Row({token: weight / total for token, weight in entries.items()}, tail / total)


def wanted_contrast(first: Row, second: Row, alpha: float) -> Row:
    """∝ q/p where q ≥ alpha·max q, nothing elsewhere."""
    least = alpha * max(second.entries.values())
    ratios = {
        token: prob / first.entries[token] if prob >= least else 0.0
        for token, prob in second.entries.items()
    }
    total = math.fsum(ratios.values())
    return Row({token: ratio / total for token, ratio in ratios.items()})


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(0, 6),
    size=vocab_sizes,
    spread=st.sampled_from([0.0, 0.5, 2.0, 8.0]),
    share=st.sampled_from([0.1, 0.5, 1.0, 10.0]),  # 10: full supports, in any order
    eta=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
)
def test_a_mixture_is_its_definition_with_the_tails_as_one_outcome(
    seed: int, positions: int, size: int, spread: float, share: float, eta: float
) -> None:
    one, other = random_pair(np.random.default_rng(seed), positions, size, spread, share)
    common = common_supports(*supports_of_pair((one, other)))

    wanted = [
        wanted_mixture(*both_on_common(left, right), eta)
        for left, right in zip(one, other, strict=True)
    ]
    assert_rows(mixture(common, eta), wanted, rtol=1e-10)


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(0, 6),
    size=vocab_sizes,
    spread=st.sampled_from([0.5, 2.0, 8.0]),
    share=st.sampled_from([0.1, 0.5, 1.0, 10.0]),
    alpha=st.sampled_from([1e-6, 0.2, 0.7, 1.0]),
)
def test_a_contrast_is_its_definition_on_the_common_ids(
    seed: int, positions: int, size: int, spread: float, share: float, alpha: float
) -> None:
    one, other = random_pair(np.random.default_rng(seed), positions, size, spread, share)
    common = common_supports(*supports_of_pair((one, other)))

    made = contrasted(common, alpha)
    for row, left, right in zip(rows_of(made), one, other, strict=True):
        wanted = wanted_contrast(*both_on_common(left, right), alpha)
        entries = {token: wanted.entries[token] for token in row.entries}
        np.testing.assert_allclose(
            list(row.entries.values()), list(entries.values()), rtol=1e-10, atol=1e-300
        )
        assert len(entries) == len(wanted.entries)
        assert row.tail == 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_full_supports_give_the_dense_mixture_and_contrast(eta: float) -> None:
    rng = np.random.default_rng(4)
    base, teacher = random_probs(rng, 50, 3.0), random_probs(rng, 50, 3.0)
    one = supports_of([Row(dict(enumerate(base)))])
    other = supports_of([Row({token: teacher[token] for token in reversed(range(50))})])
    common = common_supports(one, other)

    both = list(zip(base, teacher, strict=True))
    weights = [math.exp((1 - eta) * math.log(b) + eta * math.log(q)) for b, q in both]
    np.testing.assert_allclose(
        mixture(common, eta).probs, np.array(weights) / math.fsum(weights), rtol=1e-10
    )
    ratios = [q / b if q >= 0.2 * max(teacher) else 0.0 for b, q in both]
    np.testing.assert_allclose(
        contrasted(common, 0.2).probs, np.array(ratios) / math.fsum(ratios), rtol=1e-10
    )


def dense_divergence(of: Probs, to: Probs) -> float:
    """KL(of ‖ to) over the whole vocabulary."""
    return math.fsum(
        p * (math.log(p) - math.log(q)) if q else math.inf for p, q in zip(of, to, strict=True) if p
    )


@settings(max_examples=300, deadline=None)
@pairs
def test_a_common_divergence_is_never_above_the_dense_one(
    seed: int, positions: int, size: int, spread: float, share: float
) -> None:
    one, other = random_pair(np.random.default_rng(seed), positions, size, spread, share)
    found = common_divergence(common_supports(*supports_of_pair((one, other))))

    for value, left, right in zip(found, one, other, strict=True):
        dense = dense_divergence(right.probs, left.probs)
        assert -1e-12 <= value <= dense + 1e-12 * (1 + abs(dense))


@settings(max_examples=100, deadline=None)
@given(seed=seeds, size=vocab_sizes, spread=st.sampled_from([0.0, 0.5, 2.0, 8.0]))
def test_a_common_divergence_on_full_supports_is_the_dense_one(
    seed: int, size: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    base, teacher = random_probs(rng, size, spread), random_probs(rng, size, spread)
    one = supports_of([Row(dict(enumerate(base)))])
    other = supports_of([Row({token: teacher[token] for token in rng.permutation(size).tolist()})])
    found = common_divergence(common_supports(one, other))

    wanted = [pytest.approx(dense_divergence(teacher, base), rel=1e-11, abs=1e-12)]
    assert found.tolist() == wanted


def test_a_common_divergence_counts_the_tails_as_one_outcome() -> None:
    one = supports_of([Row({0: 0.5, 1: 0.25}, 0.25)])
    other = supports_of([Row({1: 0.75}, 0.25)])
    found = common_divergence(common_supports(one, other))

    wanted = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert found.tolist() == [pytest.approx(wanted, rel=1e-14)]


def test_a_divergence_from_a_tail_of_nothing_is_large_rather_than_negative() -> None:
    certain, unsure = supports_of([Row({0: 1.0})]), supports_of([Row({0: 0.5}, 0.5)])

    assert common_divergence(common_supports(certain, unsure))[0] > 10
    wanted = [pytest.approx(math.log(2))]
    assert common_divergence(common_supports(unsure, certain)).tolist() == wanted
    assert common_divergence(common_supports(certain, certain)).tolist() == [0.0]
