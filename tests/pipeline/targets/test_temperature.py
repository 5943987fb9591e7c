"""Tempered supports against whole tempered vocabularies."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.targets.distributions import Supports
from qpipe.pipeline.targets.temperature import tempered

pytestmark = pytest.mark.filterwarnings("error")

LogProbs = list[float]
TEMPERATURES = [0.05, 0.3, 0.7, 0.999, 1.0, 1.001, 1.5, 4.0, 20.0]
seeds = st.integers(0, 2**32 - 1)
temperatures = st.sampled_from(TEMPERATURES) | st.floats(0.05, 20)


@dataclass(frozen=True)
class Known:
    """A dense distribution and the ids at which it is known: a top k, others, an observed one."""

    log_probs: LogProbs
    top_k: int
    others: tuple[int, ...] = ()  # gathered, or observed

    @property
    def ids(self) -> list[int]:
        """The top k first, then the others, most probable first."""
        order = sorted(range(len(self.log_probs)), key=lambda token: -self.log_probs[token])
        return [
            token for rank, token in enumerate(order) if rank < self.top_k or token in self.others
        ]

    @property
    def tail(self) -> float:
        known = set(self.ids)
        rest = [math.exp(each) for token, each in enumerate(self.log_probs) if token not in known]
        return math.fsum(rest)


def log_softmax(logits: LogProbs) -> LogProbs:
    highest = max(logits)
    log_norm = highest + math.log(math.fsum(math.exp(logit - highest) for logit in logits))
    return [logit - log_norm for logit in logits]


def supports_of(rows: list[Known]) -> Supports:
    return Supports(
        np.array([len(row.ids) for row in rows], np.int64),
        np.array([token for row in rows for token in row.ids], np.int32),
        np.array([row.log_probs[token] for row in rows for token in row.ids], np.float64),
        np.array([row.tail for row in rows], np.float64),
    )


def true_tempered(row: Known, temperature: float) -> tuple[list[float], float]:
    """The whole vocabulary at a temperature, at the known ids and outside of them."""
    probs = [math.exp(each) for each in log_softmax([p / temperature for p in row.log_probs])]
    known = set(row.ids)
    return [probs[token] for token in row.ids], math.fsum(
        prob for token, prob in enumerate(probs) if token not in known
    )


def distance(found: list[float], wanted: list[float]) -> float:
    """The total variation distance."""
    return 0.5 * math.fsum(abs(f - w) for f, w in zip(found, wanted, strict=True))


def assert_within_bound(rows: list[Known], temperature: float, top_k: int) -> list[float]:
    vocab_size = len(rows[0].log_probs)
    known = supports_of(rows)
    made, bounds = tempered(known, temperature, top_k, vocab_size)

    assert made.counts.tolist() == known.counts.tolist()
    assert made.ids.tolist() == known.ids.tolist()
    assert np.isfinite(made.log_probs).all()
    assert np.isfinite(made.tail_mass).all()
    assert (made.tail_mass >= 0).all()
    assert len(bounds) == len(rows)
    ends = np.cumsum(known.counts)
    for row, end, tail, bound in zip(rows, ends, made.tail_mass, bounds, strict=True):
        entries = [math.exp(each) for each in made.log_probs[end - len(row.ids) : end]]
        true, true_tail = true_tempered(row, temperature)
        assert math.fsum([*entries, tail]) == pytest.approx(1, abs=1e-12)
        assert 0 <= bound <= 0.5
        assert distance([*entries, tail], [*true, true_tail]) <= bound + 1e-12
    return bounds.tolist()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 100.0])
def test_a_full_support_is_tempered_exactly(temperature: float, spread: float) -> None:
    rng = np.random.default_rng(1)
    rows = [Known(log_softmax((spread * rng.standard_normal(30)).tolist()), 30) for _ in range(5)]
    made, bounds = tempered(supports_of(rows), temperature, 30, 30)

    wanted = [prob for row in rows for prob in true_tempered(row, temperature)[0]]
    np.testing.assert_allclose(made.probs, wanted, rtol=1e-12, atol=1e-300)
    assert made.tail_mass.tolist() == bounds.tolist() == [0.0] * 5


def test_a_temperature_worked_out_by_hand() -> None:
    row = Known([math.log(p) for p in (0.5, 0.25, 0.125, 0.125)], top_k=2)
    made, bounds = tempered(supports_of([row]), 0.5, 2, 4)

    # squares: 4/16 and 1/16 inside; outside between 2·(1/8)² = 0.5/16, all alike, and ρ·c = 1/16
    low, high = 0.5 / 5.5, 1 / 6
    assert low - 1e-15 <= made.tail_mass[0] <= high + 1e-15
    assert made.probs[0] / made.probs[1] == pytest.approx(4, rel=1e-14)
    assert made.tail_mass.tolist() == [pytest.approx((low + high) / 2, rel=1e-14)]
    assert bounds.tolist() == [pytest.approx((high - low) / 2, rel=1e-14)]


def test_the_temperature_1_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    rows = [Known(log_softmax(rng.standard_normal(20).tolist()), 4, (7,)) for _ in range(5)]
    known = supports_of(rows)
    made, bounds = tempered(known, 1.0, 4, 20)

    np.testing.assert_allclose(made.log_probs, known.log_probs, rtol=1e-12)
    np.testing.assert_allclose(made.tail_mass, known.tail_mass, rtol=1e-12)
    assert (bounds < 1e-15).all()


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_a_tail_that_is_all_alike_or_one_id_alone_reaches_the_bound(temperature: float) -> None:
    alike = Known(log_softmax([3.0, *[0.0] * 8]), top_k=1)
    full = Known(log_softmax([0.0, 0.0, *[-1e4] * 7]), top_k=1)  # as much as the k-th has

    observed = Known(alike.log_probs, top_k=1, others=(4,))  # one id less in the tail

    for row in (alike, full, observed):
        made, (bound,) = tempered(supports_of([row]), temperature, 1, 9)
        entries, tail = true_tempered(row, temperature)
        assert bound > 0.001
        reached = distance([*made.probs, made.tail_mass[0]], [*entries, tail])
        assert reached == pytest.approx(bound, rel=1e-9)


@settings(max_examples=1000, deadline=None)
@given(
    seed=seeds,
    size=st.integers(2, 25),
    spread=st.sampled_from([0.0, 0.5, 2.0, 8.0, 50.0]),
    top_k=st.integers(1, 12),
    extra=st.integers(0, 4),
    tied=st.booleans(),
    temperature=temperatures,
)
def test_the_distance_from_the_truth_is_within_the_bound(
    seed: int, size: int, spread: float, top_k: int, extra: int, tied: bool, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        logits = spread * rng.standard_normal(size)
        others = tuple(rng.integers(0, size, extra).tolist())
        rows.append(
            Known(log_softmax((np.round(logits) if tied else logits).tolist()), top_k, others)
        )

    assert_within_bound(rows, temperature, top_k)


logits_of_a_shape = st.lists(
    st.sampled_from([0.0, -1e-9, -1.0, -20.0, -200.0, -690.0, -700.0]) | st.floats(-700, 0),
    min_size=2,
    max_size=12,
)


@settings(max_examples=600, deadline=None)
@given(
    logits=logits_of_a_shape,
    top_k=st.integers(1, 12),
    other=st.integers(0, 11),
    temperature=temperatures,
)
def test_the_bound_holds_for_extreme_spreads(
    logits: LogProbs, top_k: int, other: int, temperature: float
) -> None:
    row = Known(log_softmax(logits), top_k, (other,))
    assume(min(row.log_probs) > -708)  # a tail below what a float64 holds counts as none

    assert_within_bound([row], temperature, top_k)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_entries_at_minus_700_nats_are_no_trouble(temperature: float) -> None:
    rows = [
        Known(log_softmax([0.0, -700.0, -700.0, -700.0, -701.0]), 2, (4,)),
        Known(log_softmax([0.0, 0.0, -700.0, -700.0, -700.0]), 2),
        Known(log_softmax([0.0, -1.0, -300.0, -600.0, -700.0]), 4),
    ]
    for row in rows:
        assert_within_bound([row], temperature, row.top_k)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_large_vocabulary_is_no_trouble(temperature: float) -> None:
    rng = np.random.default_rng(3)
    flat = Known(log_softmax([0.0] * 50_000), 3)
    steep = Known(log_softmax((30 * rng.standard_normal(50_000)).tolist()), 3)

    for row in (flat, steep):
        assert_within_bound([row], temperature, 3)


def test_a_tail_of_rounding_errors_below_which_entries_are_impossible_is_no_trouble() -> None:
    """Three ids are left, and share 6e-9, though the last entry is said to be less probable."""
    supports = Supports(
        np.array([2]), np.array([0, 1], np.int32), np.array([0.0, -1500]), np.array([6e-9])
    )
    found, bound = tempered(supports, 20.0, 2, 5)
    others = 3 * (2e-9) ** (1 / 20)  # e^-75 of the other entry is nothing
    assert found.probs == pytest.approx([1 / (1 + others), 0], abs=1e-12)
    assert found.tail_mass == pytest.approx([others / (1 + others)])
    assert bound == pytest.approx([0], abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_with_all_ids_gathered_it_is_exact(temperature: float) -> None:
    rng = np.random.default_rng(5)
    row = Known(log_softmax(rng.standard_normal(30).tolist()), 4, tuple(range(30)))

    assert assert_within_bound([row], temperature, 4) == [0.0]


def test_a_gathered_entry_says_nothing_of_how_probable_the_tail_may_be() -> None:
    """Of tokens 1 to 4 only the least probable was gathered: the others may have as much as 0."""
    row = Known(log_softmax([0.0, -0.1, -0.1, -0.1, -9.0]), top_k=1, others=(4,))

    for temperature in (0.2, 5.0):
        assert_within_bound([row], temperature, 1)


def test_a_position_is_tempered_alike_wherever_it_stands() -> None:
    rng = np.random.default_rng(6)
    rows = [
        Known(log_softmax(rng.standard_normal(20).tolist()), 5, (int(rng.integers(20)),))
        for _ in range(30)
    ]
    together, bounds = tempered(supports_of(rows), 0.7, 5, 20)
    apart = [tempered(supports_of([row]), 0.7, 5, 20) for row in rows]

    log_probs = np.concatenate([made.log_probs for made, _ in apart])
    np.testing.assert_allclose(together.log_probs, log_probs, rtol=1e-13)
    tails = [made.tail_mass[0] for made, _ in apart]
    np.testing.assert_allclose(together.tail_mass, tails, rtol=1e-13)
    np.testing.assert_allclose(bounds, [bound[0] for _, bound in apart], rtol=1e-9)


def test_no_positions_are_tempered_to_none() -> None:
    made, bounds = tempered(supports_of([]), 0.7, 5, 20)

    assert made.ids.tolist() == made.tail_mass.tolist() == bounds.tolist() == []
