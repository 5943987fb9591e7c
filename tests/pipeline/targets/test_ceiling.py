"""The ceiling of targets against sums over the whole vocabulary, token by token."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.format.batches import cut
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choose
from qpipe.pipeline.targets.build import Evidence, ScoreModel, Truncation
from qpipe.pipeline.targets.ceiling import (
    Ceiling,
    ceiling_advice,
    ceilings,
    has_ceiling,
    reproducible_share,
)
from qpipe.tests.support.methods import DIVERGENCES

from .dense_ceiling import (
    BUCKETS,
    CHOICES,
    DEMONSTRATIONS,
    NAMES,
    VOCAB_SIZE,
    WHOLE,
    Demonstration,
    Position,
    assert_ceilings,
    divergence,
    each_choice,
    evidence_of,
    name_of,
    random_demonstrations,
    sums_of,
    wanted_ceilings,
    wanted_share,
)


def test_the_demonstrations_are_in_all_buckets() -> None:
    found = Counter(
        next(place for place, (low, high) in enumerate(BUCKETS) if low <= at.b < high)
        for each in DEMONSTRATIONS
        for at in each
    )
    assert min(found[bucket] for bucket in range(5)) >= 3
    shares = [wanted_share(choice, DEMONSTRATIONS) for choice in CHOICES]
    assert 0 < sorted(shares)[3] < 1  # some methods teach some demonstrations whole, not all


@each_choice
def test_on_full_supports_the_ceiling_is_the_dense_one(choice: Choice) -> None:
    sums = sums_of(evidence_of(DEMONSTRATIONS), choice)

    assert_ceilings(ceilings(sums), wanted_ceilings(choice, DEMONSTRATIONS))
    share = reproducible_share(sums, len(DEMONSTRATIONS))
    assert share == wanted_share(choice, DEMONSTRATIONS)


@each_choice
def test_at_a_temperature_it_is_compared_with_the_base_as_it_was_scored(choice: Choice) -> None:
    for temperatures in product([0.5, 2.0], [1.0, 3.0]):  # the base's, the teacher's
        evidence = evidence_of(DEMONSTRATIONS, 10**9, *temperatures)
        tempered = [[at.at(*temperatures) for at in each] for each in DEMONSTRATIONS]

        sums = sums_of(evidence, choice)
        assert_ceilings(ceilings(sums), wanted_ceilings(choice, tempered))
        assert reproducible_share(sums, len(tempered)) == wanted_share(choice, tempered)


OF_A_TEACHER = ("kd", "kd-hybrid", "target-sft", "contrast", *DIVERGENCES, "se-kd", "tip", "amid")
# idft's weight reads the entropy over the whole vocabulary
ELSEWHERE = (*OF_A_TEACHER, "label-smoothing", "idft", "deft")
LIKE_THE_BASE = [c for c in CHOICES if c.method.name not in ELSEWHERE]


@pytest.mark.parametrize("choice", LIKE_THE_BASE, ids=name_of)
@pytest.mark.parametrize(("top_k", "truncation"), [(20, Truncation(0.5, 2)), (25, WHOLE)])
def test_where_the_rest_goes_to_the_base_truncation_changes_nothing(
    choice: Choice, top_k: int, truncation: Truncation
) -> None:
    sums = sums_of(evidence_of(DEMONSTRATIONS, top_k), choice, truncation)

    assert_ceilings(ceilings(sums), wanted_ceilings(choice, DEMONSTRATIONS))
    share = reproducible_share(sums, len(DEMONSTRATIONS))
    assert share == wanted_share(choice, DEMONSTRATIONS)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(1, 12),
    name=st.sampled_from(["kd", "kd-hybrid", "label-smoothing"]),
    max_support=st.sampled_from([1, 3, 100]),
    temperature=st.sampled_from([1.0, 0.5]),
)
def test_where_it_goes_elsewhere_only_the_divergence_is_too_low(
    seed: int, top_k: int, name: str, max_support: int, temperature: float
) -> None:
    """Whatever the base's temperature: buckets and divergence are of the base as it was scored."""
    demonstrations = random_demonstrations(seed, 12)
    choice = choose(name)
    evidence = evidence_of(demonstrations, top_k, temperature)
    found = ceilings(sums_of(evidence, choice, Truncation(0.9, max_support)))

    for row, dense in zip(found, wanted_ceilings(choice, demonstrations), strict=True):
        assert row.name == dense.name
        assert -1e-12 <= row.divergence <= dense.divergence + 1e-12
        assert (row.positions, row.learnable) == (dense.positions, dense.learnable)
        assert row.nll == pytest.approx(dense.nll, rel=1e-9)


@each_choice
@pytest.mark.parametrize("most_positions", [1, 4, 13])
def test_the_sums_of_any_cutting_add_up_to_the_same(choice: Choice, most_positions: int) -> None:
    whole = evidence_of(DEMONSTRATIONS, 20 if choice.method.name != "contrast" else 30)
    assert whole.teacher_scores is not None
    truncation = Truncation(0.9, 6)
    schema = schema_of("score", VOCAB_SIZE)
    pieces = zip(
        cut(schema, whole.scores, most_positions),
        cut(schema, whole.teacher_scores, most_positions),
        strict=True,
    )
    apart = [
        sums_of(Evidence(own, whole.base_model, other, whole.teacher_model), choice, truncation)
        for own, other in pieces
    ]

    together = sums_of(whole, choice, truncation)
    assert len(apart) > 3
    assert {name: math.fsum(each[name] for each in apart) for name in together} == pytest.approx(
        together, rel=1e-12, abs=1e-12
    )
    assert all(set(each) == set(together) for each in apart)


# By hand.


def overall(choice: Choice, *demonstrations: Demonstration) -> tuple[Ceiling, float]:
    sums = sums_of(evidence_of(demonstrations), choice)
    return ceilings(sums)[0], reproducible_share(sums, len(demonstrations))


def test_a_token_that_shares_the_highest_probability_is_not_learnt() -> None:
    tied = Position([0.4, 0.4, 0.2], [0.375, 0.375, 0.25], observed=0)
    above = Position([0.4, 0.4, 0.2], [0.5, 0.375, 0.125], observed=0)

    assert overall(choose("kd"), [tied])[0].learnable == 0
    assert overall(choose("kd"), [above])[0].learnable == 1
    row, share = overall(choose("kd"), [above, tied], [above])
    assert (row.learnable, share) == (pytest.approx(2 / 3), 0.5)


def test_a_target_of_next_to_nothing_counts_as_1e_10() -> None:
    unlikely = Position([0.5, 0.25, 0.25], [0.5, 0.5 - 1e-30, 1e-30], observed=2)

    for name in ("kd", "contrast"):
        row, _ = overall(choose(name), [unlikely])
        assert row.nll == pytest.approx(-math.log(1e-10))
    assert overall(choose("sft+kl"), [unlikely])[0].nll == pytest.approx(
        -math.log(1 / 1.1 + (1 - 1 / 1.1) * 0.25)
    )


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_uniform_rest_leaves_each_other_token_its_part_only(share: float) -> None:
    unlikely = Position([0.9, 0.06, 0.04], [0.9, 0.06, 0.04], observed=2)
    row, _ = overall(choose("label-smoothing", given={"lam": share}), [unlikely])

    assert row.nll == pytest.approx(-math.log(1 - share + share / 3))
    assert row.learnable == 1


def test_a_uniform_rest_is_compared_with_the_base_at_all_its_entries() -> None:
    """So the advice of compare-methods does not prefer it for what is not looked at."""
    probs = [0.5, 0.3, 0.15, 0.05]
    evidence = evidence_of([[Position(probs, probs, observed=3)]], top_k=2)
    row, *_ = ceilings(sums_of(evidence, choose("label-smoothing", given={"lam": 0.4})))
    target = [0.1, 0.1, 0.1, 0.7]  # the one id that is not stored is a bucket of its own
    assert row.divergence == pytest.approx(divergence(target, probs), rel=1e-12)


def test_a_weight_is_starved_but_its_target_is_one_hot() -> None:
    unlikely = Position([0.9, 0.06, 0.04], [0.9, 0.06, 0.04], observed=2)
    weighted, share = overall(choose("dft", "frozen-weight"), [unlikely])
    soft, soft_share = overall(choose("dft", "frozen-target"), [unlikely])
    live, live_share = overall(choose("dft", "live"), [unlikely])

    assert (weighted.nll, weighted.learnable, weighted.starved, share) == (0, 1, 1, 1)
    assert weighted.divergence == pytest.approx(-math.log(0.04))
    assert soft.nll == pytest.approx(-math.log(0.04 + 0.96 * 0.04))
    assert (soft.learnable, soft.starved, soft_share) == (0, 1, 0)
    assert (live, live_share) == (soft, soft_share)


def test_trust_is_small_below_a_twentieth() -> None:
    def starved(mask: float) -> float:
        at = Position([0.5, 0.5], [0.5, 0.5], 0, mask)
        return overall(choose("cft", "frozen-target"), [at])[0].starved

    assert [starved(mask) for mask in (0.0, 0.0499, 0.05, 1.0)] == [1, 1, 0, 0]


def test_a_certain_token_is_in_the_last_bucket() -> None:
    sums = sums_of(evidence_of([[Position([1 - 1e-17, 1e-17], [0.5, 0.5], 0)]]), choose("sft"))

    assert [row.positions for row in ceilings(sums)] == [1, 0, 0, 0, 0, 1]
    assert [row.name for row in ceilings(sums)] == NAMES


def test_a_demonstration_without_supervised_tokens_counts_as_reproducible() -> None:
    unlikely = Position([0.9, 0.1], [0.9, 0.1], observed=1)

    assert overall(choose("kd"), [unlikely], [], [])[1] == pytest.approx(2 / 3)


@each_choice
def test_no_demonstrations_have_a_ceiling_of_zeros(choice: Choice) -> None:
    sums = sums_of(evidence_of([]), choice)

    assert ceilings(sums) == [Ceiling(name, 0, 0.0, 0.0, 0.0, 0.0) for name in NAMES]
    assert reproducible_share(sums, 0) == 0


@pytest.mark.filterwarnings("error")
@each_choice
def test_a_base_that_is_certain_of_another_token_has_a_finite_ceiling(choice: Choice) -> None:
    rest = 1e-300 / 2
    sure = Position([1.0, 1e-300, rest, rest], [0.25] * 4, observed=1)
    for temperature in (0.5, 1.0, 3.0):
        evidence = evidence_of([[sure]], 4, temperature, temperature)
        evidence.scores["topk_log_probs"][2:] = -math.inf  # ids that the base can never write
        sums = sums_of(evidence, choice)

        assert np.isfinite(list(sums.values())).all(), temperature


def test_gem_has_no_ceiling() -> None:
    gem = choose("gem", "live")

    assert not has_ceiling(gem, ScoreModel(20, 30))
    assert sums_of(evidence_of(DEMONSTRATIONS), gem) == {}
    assert ceilings({}) == ceilings({"trust": 1.0}) == []
    assert all(has_ceiling(choice, ScoreModel(30, 30)) for choice in CHOICES)


def test_a_target_that_follows_20_tokens_is_not_known_from_fewer() -> None:
    eaft = choose("eaft", "live")

    assert not has_ceiling(eaft, ScoreModel(19, 30))
    assert has_ceiling(eaft, ScoreModel(5, 5))
    assert has_ceiling(choose("dft", "live"), ScoreModel(1, 30))


def test_a_target_that_follows_the_whole_entropy_is_not_known_from_a_part() -> None:
    """Taken from what is stored, the tail as one token, it can be half of what it is."""
    assert not has_ceiling(choose("idft", "live"), ScoreModel(29, 30))
    assert has_ceiling(choose("idft", "live"), ScoreModel(30, 30))


@pytest.mark.parametrize(
    ("learnable", "reproducible", "is_said"),
    [
        (1.0, 1.0, False),
        (2 / 3, 0.5, False),
        (0.6666, 0.5, True),
        (2 / 3, 0.4999, True),
        (1.0, 0.0, True),
        (0.0, 1.0, True),
    ],
)
def test_advice_is_given_where_a_third_of_the_tokens_or_most_demonstrations_cannot_be_learnt(
    learnable: float, reproducible: float, is_said: bool
) -> None:
    advice = ceiling_advice(Ceiling("all", 9, 1.0, learnable, 0.0, 0.0), reproducible)

    assert bool(advice) == is_said
    if is_said:
        assert f"{1 - learnable:.0%} of the tokens" in advice
        assert f"{1 - reproducible:.0%} of the demonstrations" in advice
        assert "sft+kl" in advice
