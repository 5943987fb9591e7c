"""What is said of a token, against values worked out by hand."""

import math

import numpy as np
import pytest
from qpipe.pipeline.format.batches import flatten
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.targets.known import known_supports
from qpipe.stages.looking import measures
from qpipe.stages.looking.measures import MEASURES
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import VOCAB_SIZE

LOG2 = math.log(2)


def batch_of(example):
    stage = "build-targets" if hasattr(example, "trust") else "score"
    return flatten(schema_of(stage, VOCAB_SIZE), [example])


def test_a_target_is_trust_in_the_observed_token_and_the_rest_of_the_residual() -> None:
    batch = batch_of(targeted("a", [0, 7, 8], [0.5, 0.0], [{9: 0.5, 7: 0.25}, {8: 0.25, 9: 0.75}]))
    own = measures.target_supports(batch)
    said = measures.of_targets(batch, own)
    assert own.ids.tolist() == [7, 9, 9, 8]  # most probable first
    np.testing.assert_allclose(own.probs, [0.625, 0.25, 0.75, 0.25])
    np.testing.assert_allclose(own.tail_mass, [0.125, 0], atol=1e-7)
    np.testing.assert_allclose(said["target"], [0.625, 0.25])
    np.testing.assert_allclose(said["nll"], [-math.log(0.625), 2 * LOG2])
    np.testing.assert_allclose(said["rank"], [1, 2])
    np.testing.assert_allclose(said["trust"], [0.5, 0])
    np.testing.assert_allclose(said["kept"], [0.75, 1])
    first = -sum(p * math.log(p) for p in (0.625, 0.25, 0.125))
    second = -sum(p * math.log(p) for p in (0.75, 0.25))
    np.testing.assert_allclose(said["entropy"], [first, second])


def test_scores_say_what_was_scored() -> None:
    batch = batch_of(scored("a", [0, 7], [{9: 0.5, 7: 0.25}]))
    said = measures.of_scores(batch, known_supports(batch))
    np.testing.assert_allclose(said["base"], [0.25], rtol=1e-6)
    np.testing.assert_allclose(said["entropy"], [1.5 * LOG2], rtol=1e-6)
    assert said["rank"].tolist() == [2]
    assert said["support"].tolist() == [2]


def test_divergences_take_what_only_one_knows_as_one_outcome() -> None:
    one = measures.target_supports(batch_of(targeted("a", [0, 7], [0.0], [{7: 0.5, 8: 0.5}])))
    other = known_supports(batch_of(scored("a", [0, 7], [{7: 0.25, 9: 0.5}])))
    # common: 7, and the rest
    np.testing.assert_allclose(
        measures.divergence(one, other), [0.5 * LOG2 + 0.5 * math.log(0.5 / 0.75)], rtol=1e-6
    )
    np.testing.assert_allclose(measures.total_variation(one, other), [0.25], rtol=1e-6)
    np.testing.assert_allclose(measures.total_variation(one, one), [0])
    np.testing.assert_allclose(measures.divergence(other, other), [0])


@pytest.mark.parametrize(
    ("name", "values", "filled"),
    [
        ("trust", [0.0, 0.049, 0.05, 0.95, 1.0], {0: 2, 1: 1, 19: 2}),
        ("rank", [1, 2, 4, 5, 6, 10, 11, 5000], {0: 1, 1: 1, 3: 2, 4: 2, 5: 1, 7: 1}),
        ("nll", [0.0, 0.25, 5.9, 80.0], {0: 1, 1: 1, 23: 2}),
        ("gain", [-1.0, 0.0, 1.0], {0: 1, 10: 1, 19: 1}),
        ("kept", [0.99, 0.9951, 1.0], {6: 1, 7: 1, 8: 1}),
        ("weight", [0.05, 1.0, 1.1, 1.5, 100.0], {0: 1, 10: 1, 11: 1, 15: 1, 19: 1}),
    ],
)
def test_histograms_count_each_value_once(name: str, values: list[float], filled: dict) -> None:
    bins = MEASURES[name].histogram(np.array(values, np.float64))
    assert {place: int(count) for place, count in enumerate(bins) if count} == filled
    labels = MEASURES[name].labels
    assert len(bins) == len(MEASURES[name].edges) - 1 == (len(labels) or len(bins))
