"""Three models at observed tokens, and the dense target of a method there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.methods import dense_target
from qpipe.tests.support.methods import FACTS, Parameters

LIBRARIES = ("numpy", "torch")


@dataclass(frozen=True)
class Case:
    """What three models say [B, T, V] of observed tokens [B, T], all of them one data set."""

    student: Any
    base: Any
    teacher: Any
    observed: Any
    mask: Any

    def in_library(self, library: str) -> "Case":
        if library == "numpy":
            return self
        return Case(*map(torch.from_numpy, vars(self).values()))

    def target(
        self, name: str, form: str, given: Parameters, models: tuple[str, ...] | None = None
    ) -> tuple[Any, Any]:
        """What the code under test says, shown only the models that the method reads."""
        # where it reads none, any model gives the shape
        models = models or FACTS[name, form].reads or ("student" if form == "live" else "base",)
        known = {f"{model}_log_probs": getattr(self, model) for model in models}
        mask = self.mask if name == "cft" else None
        return dense_target(name, form=form, observed=self.observed, mask=mask, **known, **given)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1)[..., None]


def make_case(
    seed: int, batch: int, length: int, vocab: int, spread: float, nearness: float = 0.5
) -> Case:
    rng = np.random.default_rng(seed)
    shape = (batch, length, vocab)
    base = spread * rng.standard_normal(shape)
    student = log_softmax(base + nearness * spread * rng.standard_normal(shape))
    teacher = log_softmax(base + spread * rng.standard_normal(shape))
    # every other token is a likely one
    likely = np.argmax(student + rng.gumbel(size=shape), axis=-1)
    anything = rng.integers(0, vocab, (batch, length))
    observed = np.where(rng.random((batch, length)) < 0.5, likely, anything)
    mask = rng.random((batch, length)).round(1)
    return Case(student, log_softmax(base), teacher, observed, mask)


CASES = [
    make_case(0, 1, 1, 2, 0.5),
    make_case(1, 2, 3, 3, 1.0),
    make_case(2, 1, 9, 20, 2.0),
    make_case(3, 3, 5, 21, 4.0),
    make_case(4, 2, 9, 60, 8.0),
    make_case(5, 3, 7, 60, 0.5, nearness=0.1),
    make_case(6, 1, 8, 7, 2.0, nearness=0.1),
    make_case(7, 2, 8, 33, 1.0),
]
