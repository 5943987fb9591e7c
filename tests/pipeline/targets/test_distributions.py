"""Ragged supports against plain loops over dense distributions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.targets.distributions import (
    Supports,
    common_divergence,
    common_supports,
    contrasted,
    known_supports,
    mixture,
    most_probable_first,
    normalised,
    observed_only,
    padded,
    safe_log,
    truncated,
    unpadded,
    within,
)

Probs = list[float]
seeds = st.integers(0, 2**32 - 1)
vocab_sizes = st.integers(2, 30)
spreads = st.sampled_from([0.0, 0.5, 2.0, 8.0, 100.0])
shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])  # of the vocabulary in the top k
top_ps = st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0]) | st.floats(1e-6, 1)
max_supports = st.sampled_from([1, 2, 5, 64, 10**9])


@dataclass(frozen=True)
class Known:
    """What is known at a position: some of a dense distribution's tokens, and the observed one."""

    probs: Probs
    ids: list[int]  # most probable first
    observed: int

    @property
    def tail(self) -> float:
        return outside(self.probs, self.ids)

    @property
    def all_ids(self) -> list[int]:
        return self.ids if self.observed in self.ids else [*self.ids, self.observed]

    def support(self) -> "Row":
        return Row({token: self.probs[token] for token in self.all_ids}, self.all_tail)

    @property
    def all_tail(self) -> float:
        return outside(self.probs, self.all_ids)


@dataclass(frozen=True)
class Row:
    """A position's support as token: probability, and its tail."""

    entries: Mapping[int, float]
    tail: float = field(default=0.0)


def outside(probs: Probs, ids: Sequence[int]) -> float:
    return math.fsum(prob for token, prob in enumerate(probs) if token not in ids)


def random_probs(rng: np.random.Generator, size: int, spread: float, tied: bool = False) -> Probs:
    logits = spread * rng.standard_normal(size)
    if tied:
        logits = np.round(logits)
    weights = [math.exp(logit - max(logits)) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def ranked(probs: Probs) -> list[int]:
    return sorted(range(len(probs)), key=lambda token: -probs[token])


def random_known(
    rng: np.random.Generator, size: int, spread: float, top_k: int, extra: int = 0
) -> Known:
    """The top k, some ids gathered besides, and an observed token from anywhere."""
    probs = random_probs(rng, size, spread)
    top = set(ranked(probs)[:top_k]) | set(rng.integers(0, size, extra).tolist())
    ids = [token for token in ranked(probs) if token in top]
    return Known(probs, ids, int(rng.integers(size)))


def scores_of(rows: Sequence[Known], dtype: type = np.float64) -> FlatBatch:
    """One example with these positions, with nothing rounded unless by the type."""
    counts = np.array([len(row.ids) for row in rows], np.int32)
    entries = [row.probs[token] for row in rows for token in row.ids]
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array(entries, np.float64))
        observed = np.log(np.array([row.probs[row.observed] for row in rows], np.float64))
    arrays: dict[str, Any] = {
        "input_ids": np.array([0, *(row.observed for row in rows)], np.int32),
        "positions": np.arange(1, len(rows) + 1, dtype=np.int32),
        "counts": counts,
        "topk_ids": np.array([token for row in rows for token in row.ids], np.int32),
        "topk_log_probs": log_probs.astype(dtype),
        "observed_log_probs": observed.astype(dtype),
        "tail_mass": np.array([row.tail for row in rows], dtype),
    }
    lengths = {"token": len(rows) + 1, "position": len(rows), "entry": int(counts.sum())}
    return FlatBatch(["a"], arrays, {level: np.array([size]) for level, size in lengths.items()})


def supports_of(rows: Sequence[Row]) -> Supports:
    probs = np.array([prob for row in rows for prob in row.entries.values()], np.float64)
    return Supports(
        np.array([len(row.entries) for row in rows], np.int64),
        np.array([token for row in rows for token in row.entries], np.int32),
        safe_log(probs),
        np.array([row.tail for row in rows], np.float64),
    )


def observed_of(rows: Sequence[Known]) -> Any:
    return np.array([row.observed for row in rows], np.int32)


def rows_of(supports: Supports) -> list[Row]:
    """Each position's support in its order; an id that stands twice is an error."""
    ends = np.cumsum(supports.counts).tolist()
    assert len(supports.ids) == len(supports.log_probs) == (ends[-1] if ends else 0)
    rows = []
    for end, count, tail in zip(ends, supports.counts, supports.tail_mass, strict=True):
        ids = supports.ids[end - count : end].tolist()
        log_probs = supports.log_probs[end - count : end].tolist()
        assert len(set(ids)) == len(ids)
        probs = [math.exp(log_prob) for log_prob in log_probs]
        rows.append(Row(dict(zip(ids, probs, strict=True)), float(tail)))
    return rows


def assert_rows(
    supports: Supports, wanted: Sequence[Row], rtol: float = 1e-12, atol: float = 1e-300
) -> None:
    """The same ids in the same order, the same probabilities, the same tails."""
    found = rows_of(supports)
    assert [list(row.entries) for row in found] == [list(row.entries) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            list(row.entries.values()), list(other.entries.values()), rtol=rtol, atol=atol
        )
        np.testing.assert_allclose(row.tail, other.tail, rtol=rtol, atol=atol)


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
