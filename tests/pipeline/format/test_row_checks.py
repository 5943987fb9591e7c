"""Each rule of what a row may hold, by a batch that breaks just this one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.row_checks import Violation, violations

VOCAB = 10
LENGTHS = {"token": [2, 3, 3], "position": [1, 0, 2], "entry": [2, 0, 5]}


def batch(**arrays: Any) -> FlatBatch:
    lengths = {level: np.array(each, np.int64) for level, each in LENGTHS.items()}
    return FlatBatch(["a", "b", "c"], arrays, lengths)


def common() -> dict[str, Any]:
    """Observed are 5, then 7 and 8; two entries at the first position, three and two after."""
    return {
        "input_ids": np.array([1, 5, 1, 2, 3, 6, 7, 8], np.int32),
        "positions": np.array([1, 1, 2], np.int32),
        "counts": np.array([2, 3, 2], np.int32),
    }


def scores() -> FlatBatch:
    probs = np.array([0.5, 0.25, 0.5, 0.25, 0.125, 0.5, 0.25])
    return batch(
        **common(),
        topk_ids=np.array([5, 0, 1, 7, 9, 3, 2], np.int32),
        topk_log_probs=np.log(probs).astype(np.float32),
        tail_mass=np.array([0.25, 0.125, 0.25], np.float32),
        observed_log_probs=np.log([0.5, 0.25, 0.05]).astype(np.float32),
        observed_ranks=np.array([1, 2, VOCAB], np.int32),
        token_weights=np.array([1, 0, 2.5], np.float32),
    )


def targets() -> FlatBatch:
    return batch(
        **common(),
        support_ids=np.array([5, 0, 1, 7, 9, 3, 8], np.int32),
        support_probs=np.array([0.5, 0.25, 0.5, 0.25, 0.125, 1, 0], np.float32),
        tail_mass=np.array([0.25, 0.125, 0], np.float32),
        trust=np.array([0, 0.5, 1], np.float32),
        weights=np.array([1, 0, 2.5], np.float32),
    )


MAKERS = {"score": scores, "build-targets": targets}


def changed(stage: str, column: str, values: dict[int, float]) -> FlatBatch:
    sound = MAKERS[stage]()
    array = sound[column].copy()
    for place, value in values.items():
        array[place] = value
    return replace(sound, arrays=sound.arrays | {column: array})


@pytest.mark.parametrize("stage", MAKERS)
def test_a_sound_batch_breaks_no_rule(stage: str) -> None:
    assert list(violations(stage, MAKERS[stage](), VOCAB)) == []


@pytest.mark.parametrize("stage", MAKERS)
def test_an_empty_batch_breaks_no_rule(stage: str) -> None:
    sound = MAKERS[stage]()
    nothing = np.empty(0, np.int64)
    empty = FlatBatch(
        [],
        {name: values[:0] for name, values in sound.arrays.items()},
        dict.fromkeys(LENGTHS, nothing),
    )
    assert list(violations(stage, empty, VOCAB)) == []


SHARE, WEIGHT, TWICE = "is not a share", "is not a weight", "holds an id twice at one position"
LOG = "is not a log-probability"


@pytest.mark.parametrize(
    ("stage", "column", "values", "row", "what"),
    [
        ("score", "positions", {2: 1}, 2, "does not ascend"),
        ("score", "topk_ids", {4: 1}, 2, TWICE),
        ("score", "topk_log_probs", {2: np.log(0.125), 4: np.log(0.5)}, 2, "does not descend"),
        ("score", "observed_log_probs", {2: -np.inf}, 2, "is not a log-probability of a token"),
        ("score", "observed_log_probs", {2: np.nan}, 2, "is not a log-probability of a token"),
        ("score", "observed_log_probs", {2: 0.1}, 2, "is not a log-probability of a token"),
        ("score", "observed_log_probs", {0: -0.7}, 0, "is not that of the same id"),
        ("score", "tail_mass", {0: 0.26}, 0, "does not add up to 1 with the entries"),
        ("score", "observed_ranks", {1: 0}, 2, "is not a rank"),
        ("score", "observed_ranks", {1: VOCAB + 1}, 2, "is not a rank"),
        ("score", "token_weights", {0: -1}, 0, WEIGHT),
        ("score", "token_weights", {0: np.inf}, 0, WEIGHT),
        ("score", "token_weights", {0: np.nan}, 0, WEIGHT),
        ("build-targets", "support_ids", {4: 1}, 2, TWICE),
        ("build-targets", "support_ids", {0: 6}, 0, "lacks the observed token"),
        ("build-targets", "tail_mass", {1: 0.13}, 2, "does not add up to 1 with the support"),
        ("build-targets", "trust", {2: 1.1}, 2, SHARE),
        ("build-targets", "trust", {2: -0.1}, 2, SHARE),
        ("build-targets", "trust", {2: np.nan}, 2, SHARE),
        ("build-targets", "weights", {1: -1}, 2, WEIGHT),
        ("build-targets", "weights", {1: np.nan}, 2, WEIGHT),
        ("build-targets", "weights", {1: np.inf}, 2, WEIGHT),
    ],
)
def test_one_rule_broken_is_found_alone(
    stage: str, column: str, values: dict[int, float], row: int, what: str
) -> None:
    found = list(violations(stage, changed(stage, column, values), VOCAB))

    assert [(each.row, each.column) for each in found] == [(row, column)]
    assert found[0].what.startswith(what)


@pytest.mark.parametrize(
    ("stage", "column", "values", "wanted"),
    [
        ("score", "tail_mass", {2: np.nan}, Violation(2, "tail_mass", SHARE)),
        ("score", "tail_mass", {2: -0.5}, Violation(2, "tail_mass", SHARE)),
        ("score", "tail_mass", {2: 1.5}, Violation(2, "tail_mass", SHARE)),
        ("score", "topk_log_probs", {5: 0.5}, Violation(2, "topk_log_probs", LOG)),
        ("score", "topk_log_probs", {6: np.nan}, Violation(2, "topk_log_probs", LOG)),
        ("score", "topk_log_probs", {0: np.inf}, Violation(0, "topk_log_probs", LOG)),
        ("build-targets", "positions", {2: 1}, Violation(2, "positions", "does not ascend")),
        ("build-targets", "support_probs", {0: np.nan}, Violation(0, "support_probs", SHARE)),
        ("build-targets", "support_probs", {0: -1}, Violation(0, "support_probs", SHARE)),
        ("build-targets", "support_probs", {5: np.inf}, Violation(2, "support_probs", SHARE)),
        ("build-targets", "tail_mass", {2: np.nan}, Violation(2, "tail_mass", SHARE)),
        ("build-targets", "tail_mass", {2: -0.5}, Violation(2, "tail_mass", SHARE)),
    ],
)
def test_what_breaks_other_rules_besides_is_found(
    stage: str, column: str, values: dict[int, float], wanted: Violation
) -> None:
    """Such as masses that no longer add up."""
    found = list(violations(stage, changed(stage, column, values), VOCAB))

    assert wanted in found
    assert {each.row for each in found} == {wanted.row}


def test_the_first_row_of_several_is_named() -> None:
    found = violations("build-targets", changed("build-targets", "trust", {0: 2, 2: 2}), VOCAB)
    assert [each.row for each in found] == [0]


def test_a_probability_of_zero_is_sound() -> None:
    sound = changed("score", "topk_log_probs", {6: -np.inf})
    sound.arrays["tail_mass"][2] = 0.5
    assert list(violations("score", sound, VOCAB)) == []


def test_ids_may_come_again_at_another_position_and_in_a_large_vocabulary() -> None:
    sound = changed("build-targets", "support_ids", {5: 1})
    assert list(violations("build-targets", sound, VOCAB)) == []
    assert list(violations("build-targets", sound, 2**31 - 1)) == []
