"""Ragged supports against plain loops over dense distributions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.format.ragged import padded, unpadded
from qpipe.pipeline.targets.distributions import (
    Supports,
    common_divergence,
    common_supports,
    contrasted,
    mixture,
    most_probable_first,
    normalised,
    observed_only,
    safe_log,
    truncated,
    within,
)
from qpipe.pipeline.targets.known import known_supports, top_k_of

from .known import (
    Known,
    Probs,
    Row,
    assert_rows,
    max_supports,
    observed_of,
    random_known,
    random_probs,
    rows_of,
    scores_of,
    seeds,
    shares,
    spreads,
    supports_of,
    top_ps,
    vocab_sizes,
)

# What a batch of scores knows.


def test_an_observed_token_among_the_entries_changes_nothing() -> None:
    row = Known([0.5, 0.25, 0.125, 0.125], [0, 1, 2], observed=1)

    wanted = Row({0: 0.5, 1: 0.25, 2: 0.125}, 0.125)
    assert_rows(known_supports(scores_of([row])), [wanted])


def test_an_observed_token_outside_of_the_entries_comes_last_and_leaves_the_tail() -> None:
    row = Known([0.5, 0.25, 0.125, 0.0625, 0.0625], [0, 1], observed=3)

    wanted = Row({0: 0.5, 1: 0.25, 3: 0.0625}, 0.1875)
    assert_rows(known_supports(scores_of([row])), [wanted])


def test_it_comes_last_also_behind_less_probable_gathered_entries() -> None:
    row = Known([0.5, 0.25, 0.125, 0.0625, 0.0625], [0, 1, 4], observed=2)

    wanted = Row({0: 0.5, 1: 0.25, 4: 0.0625, 2: 0.125}, 0.0625)
    assert_rows(known_supports(scores_of([row])), [wanted])


@settings(max_examples=150, deadline=None)
@given(seed=seeds, size=vocab_sizes, spread=spreads, share=shares, extra=st.integers(0, 5))
def test_what_is_known_is_the_dense_distributions_own(
    seed: int, size: int, spread: float, share: float, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = max(1, round(share * size))
    rows = [random_known(rng, size, spread, top_k, extra) for _ in range(int(rng.integers(6)))]

    known = known_supports(scores_of(rows))
    assert_rows(known, [row.support() for row in rows], atol=1e-15)
    assert (known.tail_mass >= 0).all()


def test_an_observed_token_that_rounding_makes_more_than_the_tail_leaves_no_tail() -> None:
    rows = [Known([0.9, prob, 0.1 - prob], [0], 2) for prob in np.linspace(0, 1e-9, 50).tolist()]

    known = known_supports(scores_of(rows, np.float32))
    assert (known.tail_mass >= 0).all()
    assert (known.tail_mass < 1e-8).all()


@pytest.mark.filterwarnings("error")
def test_an_entry_of_probability_0_stays_one_and_harms_nothing() -> None:
    certain = known_supports(scores_of([Known([1.0, 0.0, 0.0], [0, 1, 2], observed=0)]))
    even = known_supports(scores_of([Known([0.5, 0.5, 0.0], [0, 1, 2], observed=0)]))

    assert certain.probs.tolist() == [1.0, 0.0, 0.0]
    for first, second in ((certain, even), (even, certain), (certain, certain)):
        common = common_supports(first, second)
        assert not np.isnan(common_divergence(common)).any()
        for made in (mixture(common, 0.5), contrasted(common, 0.2)):
            assert math.fsum([*made.probs, *made.tail_mass]) == pytest.approx(1, abs=1e-12)
    assert common_divergence(common_supports(even, certain)) == pytest.approx(math.log(2))
    assert common_divergence(common_supports(certain, even)) > 100
    assert contrasted(common_supports(certain, even), 0.2).probs == pytest.approx([0, 1, 0])


def test_no_positions_are_known_as_none() -> None:
    known = known_supports(scores_of([]))

    assert known.counts.tolist() == known.ids.tolist() == known.tail_mass.tolist() == []
    made = truncated(known, known.ids, 0.9, 5)
    assert made.counts.tolist() == made.ids.tolist() == made.tail_mass.tolist() == []
    both = common_supports(known, known)
    assert common_divergence(both).tolist() == []
    assert mixture(both, 0.5).ids.tolist() == contrasted(both, 0.5).ids.tolist() == []


def test_ranks_and_positions_count_from_0() -> None:
    supports = supports_of([Row({5: 0.5, 7: 0.25}, 0.25), Row({1: 1.0}), Row({9: 0.5, 2: 0.5})])

    assert supports.position_of.tolist() == [0, 0, 1, 2, 2]
    assert supports.ranks.tolist() == [0, 1, 0, 0, 1]
    assert supports.log_tail.tolist() == [math.log(0.25), -math.inf, -math.inf]


def test_the_observed_token_alone_leaves_the_rest_to_the_tail() -> None:
    log_probs = np.array([math.log(0.25), 0.0, -1e-18])
    alone = observed_only(np.array([3, 1, 2], np.int32), log_probs)

    assert_rows(alone, [Row({3: 0.25}, 0.75), Row({1: 1.0}), Row({2: 1.0}, 1e-18)])


# Truncation.


def wanted_prefix(row: Known, probs: Probs, top_p: float, max_support: int) -> Row:
    """Entry by entry: what is known from its mode down until `top_p` is held, then the observed
    token if that did not bring it, all of it scaled to add up to 1."""
    kept: dict[int, float] = {}
    dropped: dict[int, float] = {}
    before = 0.0
    for token, prob in zip(row.all_ids, probs, strict=True):
        full = len(kept) >= max_support or (top_p < 1 and before >= top_p)
        (dropped if dropped or full or not prob else kept)[token] = prob
        before += prob
    if row.observed in dropped:
        kept[row.observed] = dropped.pop(row.observed)
    tail = math.fsum([row.all_tail, *dropped.values()])
    total = math.fsum([tail, *kept.values()])
    return Row({token: prob / total for token, prob in kept.items()}, tail / total)


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds,
    size=vocab_sizes,
    spread=spreads,
    share=shares,
    extra=st.integers(0, 5),
    top_p=top_ps,
    max_support=max_supports,
)
def test_truncation_is_that_of_a_plain_reference(
    seed: int, size: int, spread: float, share: float, extra: int, top_p: float, max_support: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = max(1, round(share * size))
    rows = [random_known(rng, size, spread, top_k, extra) for _ in range(int(rng.integers(6)))]
    known = supports_of([row.support() for row in rows])
    cut = truncated(known, observed_of(rows), top_p, max_support)

    # as the code reads them off their logs: where top_p is just held, the last bit decides
    probs = np.split(known.probs, np.cumsum(known.counts)[:-1]) if rows else []
    wanted = [
        wanted_prefix(row, own.tolist(), top_p, max_support)
        for row, own in zip(rows, probs, strict=True)
    ]
    assert_rows(cut, wanted)
    for row in rows_of(cut):
        assert math.fsum([*row.entries.values(), row.tail]) == pytest.approx(1, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, size=vocab_sizes, share=shares, top_p=top_ps, max_support=max_supports)
def test_truncated_scores_are_the_truncation_of_all_that_they_state(
    seed: int, size: int, share: float, top_p: float, max_support: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = max(1, round(share * size))
    scores = scores_of([random_known(rng, size, 3.0, top_k, 0) for _ in range(rng.integers(6))])
    wanted = truncated(known_supports(scores), scores.observed_ids, top_p, max_support)
    made = top_k_of(scores).truncated(top_p, max_support)

    assert made.counts.tolist() == wanted.counts.tolist()
    assert made.ids.tolist() == wanted.ids.tolist()
    np.testing.assert_allclose(made.log_probs, wanted.log_probs, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(made.probs, wanted.probs, rtol=1e-14)
    np.testing.assert_allclose(made.tail_mass, wanted.tail_mass, rtol=1e-13)


@pytest.mark.parametrize(
    ("observed", "top_p", "max_support", "support", "tail"),
    [
        (0, 0.85, 64, {0: 0.5, 1: 0.25, 2: 0.125}, 0.125),  # holds 0.875; 0.75 is too little
        (0, 0.75, 64, {0: 0.5, 1: 0.25}, 0.25),  # exactly enough
        (0, 0.7, 64, {0: 0.5, 1: 0.25}, 0.25),
        (0, 1e-9, 64, {0: 0.5}, 0.5),
        (1, 1e-9, 64, {0: 0.5, 1: 0.25}, 0.25),  # observed inside the top k, after the prefix
        (3, 0.4, 64, {0: 0.5, 3: 0.0625}, 0.4375),  # outside the top k of 3
        (4, 0.85, 64, {0: 0.5, 1: 0.25, 2: 0.125, 4: 0.0625}, 0.0625),
        (3, 1.0, 64, {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.0625}, 0.0625),  # the whole top k of 3
        (0, 1.0, 1, {0: 0.5}, 0.5),
        (2, 1.0, 1, {0: 0.5, 2: 0.125}, 0.375),  # the observed token besides
        (1, 1.0, 2, {0: 0.5, 1: 0.25}, 0.25),
    ],
)
def test_truncations_worked_out_by_hand(
    observed: int, top_p: float, max_support: int, support: dict[int, float], tail: float
) -> None:
    row = Known([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], [0, 1, 2], observed)
    scores = scores_of([row])
    cut = truncated(known_supports(scores), scores.observed_ids, top_p, max_support)

    assert_rows(cut, [Row(support, tail)])


def test_top_p_1_keeps_everything_also_where_the_first_entry_is_1_already() -> None:
    supports = supports_of([Row({0: 1.0, 1: 1e-20, 2: 1e-21}, 1e-22)])
    observed = np.array([0], np.int32)

    assert truncated(supports, observed, 1.0, 64).ids.tolist() == [0, 1, 2]
    assert truncated(supports, observed, 1 - 1e-16, 64).ids.tolist() == [0]


def test_entries_of_probability_0_are_left_out_unless_observed() -> None:
    supports = supports_of([Row({4: 1.0, 1: 0.0, 2: 0.0})] * 2)
    cut = truncated(supports, np.array([4, 2], np.int32), 1.0, 64)

    assert_rows(cut, [Row({4: 1.0}), Row({4: 1.0, 2: 0.0})])


def test_what_does_not_quite_add_up_is_scaled_to_1() -> None:
    supports = supports_of([Row({0: 0.5, 1: 0.25}, 0.5)])  # 1.25 together

    wanted = Row({0: 0.4, 1: 0.2}, 0.4)
    assert_rows(normalised(supports), [wanted])
    assert_rows(truncated(supports, np.array([0], np.int32), 0.99, 64), [wanted])


def test_equally_probable_tokens_stay_in_their_order() -> None:
    supports = supports_of([Row({1: 0.3, 3: 0.3, 0: 0.1, 2: 0.1, 4: 0.1, 5: 0.1})])
    cut = truncated(supports, np.array([4], np.int32), 0.65, 64)

    assert cut.ids.tolist() == [1, 3, 0, 4]


def test_a_tail_far_below_the_resolution_of_1_survives() -> None:
    row = Known([1 - 3e-18, 1e-18, 1e-18, 1e-18], [0, 1], observed=0)
    scores = scores_of([row])
    cut = truncated(known_supports(scores), scores.observed_ids, 0.99, 64)

    assert_rows(cut, [Row({0: 1.0}, 3e-18)])


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.7, 0.9])
def test_the_same_distribution_has_the_same_support_wherever_it_stands(top_p: float) -> None:
    row = Row({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.3}, 0.1)  # sums of these are off by a last bit
    others = [Row(dict.fromkeys(range(5), 1 / 7), 2 / 7)] * 3
    alone = truncated(supports_of([row]), np.zeros(1, np.int32), top_p, 64)
    many = truncated(supports_of([*others, row] * 300), np.zeros(1200, np.int32), top_p, 64)

    assert set(many.counts[3::4].tolist()) == set(alone.counts.tolist())
    assert set(many.tail_mass[3::4].tolist()) == set(alone.tail_mass.tolist())


# A smaller vocabulary.


def test_ids_beyond_a_vocabulary_go_to_the_tail() -> None:
    supports = supports_of([Row({7: 0.5, 1: 0.25, 9: 0.125}, 0.125), Row({0: 0.5, 6: 0.5}, 1e-20)])

    wanted = [Row({1: 0.25}, 0.75), Row({0: 0.5, 6: 0.5}, 1e-20)]
    assert_rows(within(supports, 7), wanted)
    wanted = [Row({7: 0.5, 1: 0.25}, 0.25), Row({0: 0.5, 6: 0.5}, 1e-20)]
    assert_rows(within(supports, 8), wanted)
    assert_rows(within(supports, 10), rows_of(supports))


# Order, and the rectangles in between.


@settings(max_examples=150, deadline=None)
@given(seed=seeds, positions=st.integers(0, 6), size=st.integers(1, 70), tied=st.booleans())
def test_most_probable_first_is_a_stable_sort_of_each_position(
    seed: int, positions: int, size: int, tied: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(positions):
        probs = random_probs(rng, size, 20.0 if not tied else 1.0, tied)
        probs = [prob if rng.random() < 0.9 else 0.0 for prob in probs]
        ids = rng.permutation(1000)[: int(rng.integers(1, size + 1))].tolist()
        rows.append(Row(dict(zip(ids, probs, strict=False)), float(rng.random())))
    made = most_probable_first(supports_of(rows))

    ordered = [
        Row(dict(sorted(row.entries.items(), key=lambda entry: -entry[1])), row.tail)
        for row in rows
    ]
    assert_rows(made, ordered)


def test_the_order_takes_a_probability_that_rounding_puts_above_1() -> None:
    supports = Supports(
        np.array([3]), np.array([7, 8, 9], np.int32), np.array([-40.0, 2e-16, -50.0]), np.zeros(1)
    )

    assert most_probable_first(supports).ids.tolist() == [8, 7, 9]


@pytest.mark.parametrize("counts", [[], [0], [3], [2, 0, 3, 1], [0, 0]])
def test_padding_is_undone_by_unpadding(counts: list[int]) -> None:
    counts_N = np.array(counts, np.int64)
    values = np.arange(1, counts_N.sum() + 1)
    values_NS = padded(counts_N, values, -1)

    assert values_NS.shape == (len(counts), max([1, *counts]))
    assert unpadded(counts_N, values_NS).tolist() == values.tolist()
    for row, count in zip(values_NS.tolist(), counts, strict=True):
        assert row[count:] == [-1] * (len(row) - count)


def test_padding_stands_behind_each_positions_own() -> None:
    values_NS = padded(np.array([1, 0, 2]), np.array([1.5, 2.5, 3.5]), 0.0)

    assert values_NS.tolist() == [[1.5, 0.0], [0.0, 0.0], [2.5, 3.5]]


@pytest.mark.filterwarnings("error")
def test_the_log_of_0_is_what_is_asked_for() -> None:
    values = np.array([0.0, 1.0, 1e-320])

    assert safe_log(values).tolist() == [-math.inf, 0.0, math.log(1e-320)]
    assert safe_log(values, 0.0).tolist() == [0.0, 0.0, math.log(1e-320)]
