"""Targets of every method against ones worked out by hand over the whole vocabulary."""

import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.batches import FlatBatch, cut, flatten, join, split
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choices, choose
from qpipe.pipeline.targets.build import (
    SMALLEST_PROB,
    Evidence,
    ScoreModel,
    Truncation,
    flat_targets,
    targets_of,
)
from qpipe.pipeline.targets.distributions import truncated
from qpipe.tests.support.methods import (
    FACTS,
    LIVE,
    READS_STUDENT,
    b_y,
    probabilities,
)

from .dense import (
    VOCAB_SIZE,
    WHOLE,
    Dense,
    as_bytes,
    evidence_of,
    one_position,
    random_dense,
    rebuilt,
    residuals,
    settled,
    stored,
    supports_of,
    tokens_of,
    wanted_target,
)


def name_of(choice: Choice) -> str:
    return f"{choice.method.name} {choice.form}"


ALL = list(choices())
SETTLED = [c for c in ALL if c.form != LIVE or c.method.name not in READS_STUDENT]
OF_STUDENT = [c for c in ALL if c.form == LIVE and c.method.name in READS_STUDENT]
each_choice = pytest.mark.parametrize("choice", ALL, ids=name_of)
each_settled = pytest.mark.parametrize("choice", SETTLED, ids=name_of)


def test_every_choice_is_tested_one_way_or_the_other() -> None:
    assert {(c.method.name, c.form) for c in ALL} == set(FACTS)
    assert [c.reads_student for c in SETTLED] == [False] * len(SETTLED)
    assert [c.reads_student for c in OF_STUDENT] == [True] * len(OF_STUDENT)


# Every method that reads no student.


@each_settled
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_on_full_supports_the_target_is_the_definition(choice: Choice, spread: float) -> None:
    demonstrations = [random_dense(seed, spread=spread) for seed in range(5)]
    positions = tokens_of(demonstrations)
    choice, statistic = settled(choice, positions)
    targets = targets_of(evidence_of(demonstrations), choice, WHOLE)
    found, tails = rebuilt(targets, positions)

    wanted = [wanted_target(choice, at, statistic) for at in positions]
    np.testing.assert_allclose(found, [target for target, _ in wanted], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(tails, 0, atol=1e-10)
    np.testing.assert_allclose(targets.weights, [weight for _, weight in wanted], rtol=1e-9)
    for row in found:
        assert math.fsum(row) == pytest.approx(1, abs=1e-12)


@each_settled
def test_what_is_stored_is_the_definition_in_single_precision(choice: Choice) -> None:
    demonstrations = [random_dense(seed) for seed in range(4)]
    positions = tokens_of(demonstrations)
    choice, statistic = settled(choice, positions)
    made = stored(evidence_of(demonstrations, dtype=np.float32), choice)

    wanted = iter([wanted_target(choice, at, statistic) for at in positions])
    for example, demonstration in zip(made, demonstrations, strict=True):
        assert example.id == demonstration.name
        assert example.input_ids.tolist() == demonstration.input_ids
        assert example.positions.tolist() == demonstration.positions
        supports = supports_of(example.counts, example.support_ids, example.support_probs)
        for n, support in enumerate(supports):
            target, weight = next(wanted)
            trust = float(example.trust[n])
            for token, prob in support.items():
                observed = trust * (token == demonstration.observed[n])
                assert observed + (1 - trust) * prob == pytest.approx(target[token], abs=1e-6)
            outside = math.fsum(p for token, p in enumerate(target) if token not in support)
            assert (1 - trust) * example.tail_mass[n] == pytest.approx(outside, abs=1e-6)
            assert example.weights[n] == pytest.approx(weight, rel=2e-6, abs=1e-30)


@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize(
    "choice", [choose("sft+kl"), choose("asft"), choose("gift"), choose("kd-hybrid")], ids=name_of
)
def test_on_truncated_supports_it_is_the_definition_on_the_support_and_in_its_tail(
    choice: Choice, top_k: int
) -> None:
    demonstrations = [random_dense(seed) for seed in range(4)]
    positions = tokens_of(demonstrations)
    targets = targets_of(evidence_of(demonstrations, top_k), choice, Truncation(0.8, 3))
    found, tails = rebuilt(targets, positions)

    supports = residuals(targets.residual)
    assert max(map(len, supports)) <= 4
    for at, row, tail, support in zip(positions, found, tails, supports, strict=True):
        target, _ = wanted_target(choice, at, math.nan)
        for token in support:
            assert row[token] == pytest.approx(target[token], abs=1e-12)
        outside = math.fsum(p for token, p in enumerate(target) if token not in support)
        assert tail == pytest.approx(outside, abs=1e-12)


@each_settled
def test_models_are_read_at_their_temperatures(choice: Choice) -> None:
    demonstrations = [random_dense(seed) for seed in range(4)]
    for temperatures in product([0.5, 3.0], [1.0, 2.0]):  # the base's, the teacher's
        positions = tokens_of(demonstrations, *temperatures)
        of_case, statistic = settled(choice, positions)
        evidence = evidence_of(demonstrations, VOCAB_SIZE, *temperatures)
        targets = targets_of(evidence, of_case, WHOLE)

        wanted = [wanted_target(of_case, at, statistic) for at in positions]
        found, _ = rebuilt(targets, positions)
        np.testing.assert_allclose(found, [target for target, _ in wanted], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(targets.weights, [weight for _, weight in wanted], rtol=1e-9)


@pytest.mark.parametrize(
    "choice",
    [choose("kd"), choose("kd-hybrid"), choose("target-sft"), choose("contrast")],
    ids=name_of,
)
@pytest.mark.parametrize("teacher_temperature", [1.0, 0.7])
def test_a_teachers_larger_vocabulary_is_its_tail(
    choice: Choice, teacher_temperature: float
) -> None:
    demonstrations = [random_dense(seed, teacher_size=27, weights=[1]) for seed in range(4)]
    positions = tokens_of(demonstrations, 1.0, teacher_temperature)
    evidence = evidence_of(demonstrations, 27, teacher_temperature=teacher_temperature)
    targets = targets_of(evidence, choice, WHOLE)
    found, tails = rebuilt(targets, positions)

    assert (targets.residual.ids < VOCAB_SIZE).all()
    for at, row, tail in zip(positions, found, tails, strict=True):
        wanted, _ = wanted_target(choice, at, math.nan)
        np.testing.assert_allclose(row, wanted, rtol=1e-9, atol=1e-10)
        assert tail == pytest.approx(1 - math.fsum(wanted), abs=1e-10)
        if choice.residual == "teacher":
            assert tail > 1e-6


@each_settled
def test_a_certain_prior_of_another_token_gives_finite_targets(choice: Choice) -> None:
    dense = one_position([0.0, 1.0, 0.0, 0.0], 3, [0.25, 0.25, 0.25, 0.25])
    dense.base[0][3] = -200.0  # a scorer refuses an observed token without a number
    choice = choice.resolved(5.0) if choice.unresolved else choice
    for top_p in (0.99, 1.0):
        evidence = evidence_of([dense], 4, dtype=np.float32)
        [made] = stored(evidence, choice, Truncation(top_p, 64))
        [support] = supports_of(made.counts, made.support_ids, made.support_probs)

        values = [*support.values(), *made.tail_mass, *made.trust, *made.weights]
        assert np.isfinite(values).all()
        assert math.fsum([*support.values(), *made.tail_mass]) == pytest.approx(1)
        assert 3 in support
        if choice.residual == "base":
            assert (support[1], support[3], made.tail_mass[0]) == (1, 0, 0)


# Weights.


@each_choice
def test_token_weights_multiply_the_weights_unless_they_are_the_mask(choice: Choice) -> None:
    demonstrations = [random_dense(seed, weights=[0.0, 0.5, 1.0]) for seed in range(3)]
    choice = choice.resolved(2.0) if choice.unresolved else choice
    evidence = evidence_of(demonstrations)
    found = targets_of(evidence, choice, WHOLE)
    plain = evidence_of(demonstrations)
    plain.scores["token_weights"][:] = 1
    unweighted = targets_of(plain, choice, WHOLE)

    given = evidence.scores["token_weights"]
    if choice.method.name == "cft":
        has_trust = choice.form == "frozen-target"
        np.testing.assert_array_equal(found.trust, given if has_trust else 1.0)
        np.testing.assert_array_equal(found.weights, 1.0 if has_trust else given)
    else:
        np.testing.assert_array_equal(found.trust, unweighted.trust)
        np.testing.assert_array_equal(found.weights, unweighted.weights * given)


@pytest.mark.parametrize("form", ["frozen-weight", "frozen-target", "live"])
def test_a_mask_above_1_is_refused_with_the_examples_name(form: str) -> None:
    demonstrations = [random_dense(seed, positions=seed) for seed in range(5)]
    evidence = evidence_of(demonstrations)
    evidence.scores["token_weights"][0 + 1 + 2] = 1.5  # the first position of the fourth

    with pytest.raises(UserError, match=r"example chats:3: a token has the weight 1\.5"):
        targets_of(evidence, choose("cft", form), WHOLE)
    assert targets_of(evidence, choose("sft"), WHOLE).weights[3] == 1.5


# Methods that read the student as it trains.


@pytest.mark.parametrize("choice", OF_STUDENT, ids=name_of)
def test_what_reads_the_student_is_stored_with_trust_1_and_what_it_needs(choice: Choice) -> None:
    demonstrations = [random_dense(seed) for seed in range(4)]
    positions = tokens_of(demonstrations)
    targets = targets_of(evidence_of(demonstrations), choice, WHOLE)

    assert targets.trust.tolist() == [1.0] * len(positions)
    assert targets.weights.tolist() == [at.mask for at in positions]
    supports, tails = residuals(targets.residual), targets.residual.tail_mass.tolist()
    for at, support, tail in zip(positions, supports, tails, strict=True):
        wanted = {
            "observed": {at.observed: 1.0},
            "base-observed": {at.observed: b_y(at)},
            "base": dict(enumerate(probabilities(at.base))),
            "teacher": dict(enumerate(probabilities(at.teacher))),
        }[FACTS[choice.method.name, LIVE].stored]
        assert support == pytest.approx(wanted, rel=1e-10)
        assert tail == pytest.approx(1 - math.fsum(wanted.values()), abs=1e-12)


@pytest.mark.parametrize("name", ["iw-sft", "psft"])
@pytest.mark.parametrize("log_prob", [-88.0, -200.0, -1e4])
def test_a_probability_that_single_precision_loses_is_stored_as_its_smallest(
    name: str, log_prob: float
) -> None:
    dense = one_position([0.5, 0.5, 1e-9, 0.0], observed=3)
    dense.base[0][3] = log_prob
    [made] = stored(evidence_of([dense], 2), choose(name, "live"))

    assert made.support_ids.tolist() == [3]
    assert made.support_probs.tolist() == [pytest.approx(2.0**-126, rel=1e-6)]
    assert made.support_probs[0] >= np.finfo(np.float32).smallest_normal == SMALLEST_PROB
    assert made.tail_mass.tolist() == [1.0]


def test_an_observed_probability_that_rounding_puts_above_1_counts_as_1() -> None:
    dense = one_position([1.0, 1e-20], observed=0)
    dense.base[0][0] = 1e-7
    evidence = evidence_of([dense], 2)

    for name, form in (("dft", "frozen-target"), ("psft", "live"), ("dft", "frozen-weight")):
        made = targets_of(evidence, choose(name, form), WHOLE)
        assert (made.trust[0], made.weights[0]) == (1.0, 1.0)
        assert made.residual.tail_mass[0] >= 0


# A contrast needs the base at what the teacher finds likely.


def test_a_contrast_of_a_head_that_the_base_is_not_known_at_is_refused() -> None:
    first = random_dense(0, positions=2)
    base = [0.4, 0.3, 0.1, 0.1, 0.1] + [0.0] * 15
    teacher = [0.1, 0.3, 0.1, 0.1, 0.4] + [0.0] * 15
    logs = [[math.log(p) if p else -50.0 for p in probs] for probs in (base, teacher)]
    second = Dense("chats:b", [0, 1], [1], [logs[0]], [logs[1]], [1.0])
    known = [Dense("chats:a", first.input_ids, first.positions, first.base, first.base, [1, 1])]

    # the base's top 2 are tokens 0 and 1: 4 is the teacher's mode
    with pytest.raises(UserError, match=r"example chats:b: the base's probability of a token"):
        targets_of(evidence_of([*known, second], 2), choose("contrast"), WHOLE)
    made = targets_of(evidence_of([second], 2, gathered=[4]), choose("contrast"), WHOLE)
    assert residuals(made.residual)[0] == pytest.approx({4: 4 / 5, 1: 1 / 5})


def test_a_contrast_stores_its_most_probable_token_first_and_the_observed_one() -> None:
    dense = one_position([0.5, 0.2, 0.2, 0.1], 3, [0.36, 0.3, 0.3, 0.04])
    targets = targets_of(evidence_of([dense], 4), choose("contrast"), WHOLE)

    ratios = {1: 1.5, 2: 1.5, 0: 0.72, 3: 0.0}
    [support] = residuals(targets.residual)
    assert list(support) == list(ratios)
    wanted = {token: ratio / 3.72 for token, ratio in ratios.items()}
    assert support == pytest.approx(wanted)
    assert targets.weights.tolist() == [0.0]  # the two differ by less than beta


def test_a_mixture_stores_its_most_probable_tokens() -> None:
    dense = one_position([0.7, 0.2, 0.1], 0, [0.01, 0.09, 0.9])
    targets = targets_of(evidence_of([dense], 3), choose("target-sft"), Truncation(1.0, 2))

    weights = [math.sqrt(b * q) for b, q in ((0.7, 0.01), (0.2, 0.09), (0.1, 0.9))]
    [support] = residuals(targets.residual)
    total = math.fsum(weights)
    assert list(support) == [2, 1, 0]  # two, and the observed one
    wanted = {token: weights[token] / total for token in (2, 1, 0)}
    assert support == pytest.approx(wanted)


# However they are cut.


@each_choice
def test_batches_of_any_cutting_give_the_same_targets(choice: Choice) -> None:
    demonstrations = [random_dense(seed, positions=seed % 4) for seed in range(9)]
    choice = choice.resolved(2.0) if choice.unresolved else choice
    gathered = range(VOCAB_SIZE)  # or contrast is refused
    whole = evidence_of(demonstrations, 6, gathered=gathered, dtype=np.float32)
    truncation = Truncation(0.8, 5)
    together = [as_bytes(example) for example in stored(whole, choice, truncation)]

    assert whole.teacher_scores is not None
    schema = schema_of("score", VOCAB_SIZE)
    for most_positions in (1, 4, 7):
        pieces = zip(
            cut(schema, whole.scores, most_positions),
            cut(schema, whole.teacher_scores, most_positions),
            strict=True,
        )
        apart: list[FlatBatch] = []
        for own, other in pieces:
            piece = Evidence(own, whole.base_model, other, whole.teacher_model)
            apart.append(flat_targets(piece, targets_of(piece, choice, truncation)))
        assert len(apart) > 1
        made = split(schema_of("build-targets", VOCAB_SIZE), join(apart))
        assert [as_bytes(example) for example in made] == together


def test_the_same_prior_has_the_same_support_wherever_it_stands() -> None:
    row = [math.log(p) for p in (0.6, 0.2, 0.2)]
    dense = Dense("a", [0] * 1001, list(range(1, 1001)), [row] * 1000, [row] * 1000, [1.0] * 1000)
    evidence = evidence_of([dense], 3, dtype=np.float32)
    top_p = math.exp(float(evidence.scores["topk_log_probs"][0]))  # held by the first, just so
    [made] = stored(evidence, choose("sft+kl"), Truncation(top_p, 64))

    assert set(made.counts.tolist()) == {1}


@each_choice
def test_no_examples_and_no_positions_make_empty_targets(choice: Choice) -> None:
    choice = choice.resolved(2.0) if choice.unresolved else choice
    empty = random_dense(0, positions=0)
    schema = schema_of("score", VOCAB_SIZE)
    for examples in ([], [empty.scored([], 5)]):
        batch = flatten(schema, examples)
        model = ScoreModel(5, VOCAB_SIZE)
        made = stored(Evidence(batch, model, batch, model), choice)

        assert len(made) == len(examples)
        for example in made:
            assert example.counts.tolist() == example.support_ids.tolist() == []
            assert example.trust.tolist() == example.weights.tolist() == []
            assert example.input_ids.tolist() == empty.input_ids


@each_choice
def test_targets_have_the_types_of_the_record(choice: Choice) -> None:
    choice = choice.resolved(2.0) if choice.unresolved else choice
    evidence = evidence_of([random_dense(0)], 5, gathered=range(VOCAB_SIZE), dtype=np.float32)
    [made] = stored(evidence, choice)

    assert {field.name: getattr(made, field.name).dtype.name for field in fields(made)[1:]} == {
        "input_ids": "int32",
        "positions": "int32",
        "trust": "float32",
        "counts": "int32",
        "support_ids": "int32",
        "support_probs": "float32",
        "tail_mass": "float32",
        "weights": "float32",
    }


def test_the_kept_support_is_that_of_the_truncation() -> None:
    demonstrations = [random_dense(seed) for seed in range(3)]
    evidence = evidence_of(demonstrations, 6)
    targets = targets_of(evidence, choose("kd"), Truncation(0.7, 4))

    wanted = truncated(evidence.teacher, evidence.observed_ids, 0.7, 4)
    assert residuals(targets.residual) == residuals(wanted)
    assert targets.residual.tail_mass.tolist() == wanted.tail_mass.tolist()
