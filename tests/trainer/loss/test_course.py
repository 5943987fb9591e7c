"""The objective at steps of a run whose parameters change, against the dense one at each."""

from typing import Any

import pytest
import torch
from qpipe.tests.support.methods import DEFAULTS, READS_STUDENT
from qpipe.trainer.loss.course import course_of

from .objective.dense import EXACT, dense_loss
from .objective.folders import folder_targets, loss_and_gradient, objective_for, random_models

TAU_OF_DATA = {"tau": 0.8}  # the folder states the value that was found
ENDS: dict[str, dict[str, float]] = {
    "beyond-log": {"alpha": 1},
    "profit": {"tau": 0.6},
    "eaft": {"a": 3},
    "iw-sft": {"T": 2},
    "asft": {"lam": 1},
    "psft": {"eps_hi": 2},
    "gem": {"beta": 1.5},
    "target-sft": {"eta": 1},
    "mixed-kl": {"lam": 1},
    "jsd": {"beta": 0.95},
    "skew-kl": {"alpha": 0.9},
    "skew-reverse-kl": {"alpha": 0.9},
    "idft": {"beta": 0.2},
    "trsft": {"tau": 1},
    "infosft": {"P": 0.6},
    "talr": {"tau": 3, "floor": 0.3},
    "ranktuner": {"power": 2},
    "amid": {"eta": 1, "alpha": -1},
}


def test_every_live_method_with_a_number_to_change_is_tried() -> None:
    numbers = {"talr"} | {name for name in READS_STUDENT if any(DEFAULTS[name].values())}
    assert set(ENDS) == numbers | {"ranktuner"}


@pytest.mark.parametrize("name", ENDS)
def test_each_step_has_the_dense_loss_and_gradient_of_its_own_parameters(name: str) -> None:
    start: dict[str, Any] = DEFAULTS[name] | (TAU_OF_DATA if name == "talr" else {})
    logits, models = random_models(60)
    targets = folder_targets(name, "live", start, models)
    given = [f"{key}={value}" for key, value in ENDS[name].items()]
    course = course_of(objective_for(name, "live", start), given)
    seen = []
    for share in (0.0, 0.25, 2 / 3, 1.0):
        now = start | {
            key: start[key] + share * (end - start[key]) for key, end in ENDS[name].items()
        }
        losses, expected = dense_loss(name, "live", now, models)
        loss, gradient = loss_and_gradient(course.at(share), logits, targets)
        torch.testing.assert_close(loss.sum.detach(), losses.sum(), **EXACT)
        torch.testing.assert_close(gradient, expected, **EXACT)
        seen.append(gradient)
    assert not torch.allclose(seen[0], seen[-1], rtol=1e-3)
