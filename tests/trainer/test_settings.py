"""The learning rate over a run, and settings that are refused."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.trainer.data.batch import Collator
from qpipe.trainer.data.steps import StepLoader
from qpipe.trainer.settings import Schedule, TrainSettings
from qpipe.trainer.step.optimizer import learning_rate_factor


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(targets=Path("targets"), model="model", out=Path("out"), **given)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_schedule_of_six_steps_two_of_them_warm_up(
    schedule: Schedule, expected: list[float]
) -> None:
    factors = [learning_rate_factor(step, 6, 2, schedule) for step in range(6)]
    assert factors == pytest.approx(expected)


def test_one_step_takes_the_full_rate() -> None:
    assert learning_rate_factor(0, 1, 0, "cosine") == 1


def test_warm_up_to_the_end() -> None:
    factors = [learning_rate_factor(step, 3, 3, "cosine") for step in range(3)]
    assert factors == pytest.approx([0.25, 0.5, 0.75])


class Twenty:
    """Twenty samples an epoch, of 3, 4 and 5 tokens in turn."""

    def __len__(self) -> int:
        return 20

    def lengths(self, seed: int, numbers: Iterable[int]) -> Iterator[int]:
        return (3 + number % 20 % 3 for number in numbers)

    def samples(self, seed: int, numbers: Iterable[int]) -> Iterator[Any]:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize(
    ("given", "steps", "samples"),
    [
        ({}, 3, 20),
        ({"epochs": 2.5}, 7, 50),
        ({"epochs": 0.01}, 1, 1),
        ({"max_steps": 2}, 2, 16),
        ({"max_steps": 99}, 3, 20),
        ({"step_tokens": 12}, 7, 20),  # of lengths 3, 4, 5, 3, ...: three each, the last of two
        ({"step_tokens": 12, "max_steps": 2}, 2, 6),
        ({"step_tokens": 1}, 20, 20),
    ],
)
def test_the_size_of_a_run(given: dict[str, Any], steps: int, samples: int) -> None:
    epochs, max_steps = given.get("epochs", 1.0), given.get("max_steps")
    loader = StepLoader(Twenty(), 0, 8, given.get("step_tokens"), 100, Collator(packed=True))
    assert loader.size(epochs, max_steps) == (steps, samples)


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"epochs": 0},
        {"epochs": -1},
        {"epochs": math.nan},
        {"max_steps": 0},
        {"batch_size": 0},
        {"step_tokens": 0},
        {"forward_tokens": 0},
        {"save_every": 0},
        {"keep_checkpoints": 0},
        {"resume": "always"},
        {"warmup_ratio": 1.5},
        {"warmup_ratio": math.nan},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0},
        {"eval_fraction": 1},
        {"eval_fraction": -0.1},
        {"eval_every": 0, "eval_fraction": 0.1},
        {"schedule": "cosinus"},
        {"precision": "float64"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(given: dict[str, Any]) -> None:
    name, value = next(iter(given.items()))
    option = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{option} {value} is .*: give [^\n]+$"):
        settings(**given)


def test_evaluating_needs_something_held_out() -> None:
    with pytest.raises(UserError, match="--eval-fraction"):
        settings(eval_every=10)
