"""Every method in every form, what is given to it, and what the models say."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.methods import dense_target

Parameters = dict[str, Any]
LIBRARIES = ("numpy", "torch")

# Which models each form of each method reads. Where it is none, any model tells the shape.
STUDENT, BASE, TEACHER = ("student",), ("base",), ("teacher",)
NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("sft", "live"): (),
    ("sft", "frozen-target"): (),
    ("sft", "frozen-weight"): (),
    ("dft", "live"): STUDENT,
    ("dft", "frozen-target"): BASE,
    ("dft", "frozen-weight"): BASE,
    ("beyond-log", "live"): STUDENT,
    ("beyond-log", "frozen-target"): BASE,
    ("beyond-log", "frozen-weight"): BASE,
    ("profit", "live"): STUDENT,
    ("profit", "frozen-target"): BASE,
    ("profit", "frozen-weight"): BASE,
    ("eaft", "live"): STUDENT,
    ("eaft", "frozen-target"): BASE,
    ("eaft", "frozen-weight"): BASE,
    ("iw-sft", "live"): STUDENT + BASE,
    ("cft", "live"): STUDENT,
    ("cft", "frozen-target"): BASE,
    ("cft", "frozen-weight"): (),
    ("label-smoothing", "live"): (),
    ("label-smoothing", "frozen-target"): (),
    ("sft+kl", "live"): BASE,
    ("sft+kl", "frozen-target"): BASE,
    ("asft", "live"): STUDENT + BASE,
    ("asft", "frozen-target"): BASE,
    ("psft", "live"): STUDENT + BASE,
    ("gem", "live"): STUDENT,
    ("kd", "live"): TEACHER,
    ("kd", "frozen-target"): TEACHER,
    ("kd-hybrid", "live"): TEACHER,
    ("kd-hybrid", "frozen-target"): TEACHER,
    ("target-sft", "live"): STUDENT + TEACHER,
    ("target-sft", "frozen-target"): BASE + TEACHER,
    ("gift", "live"): BASE,
    ("gift", "frozen-target"): BASE,
    ("flow", "live"): STUDENT + BASE,
    ("flow", "frozen-target"): BASE,
    ("flow", "frozen-weight"): BASE,
    ("stm", "live"): STUDENT + BASE,
    ("stm", "frozen-target"): BASE,
    ("stm", "frozen-weight"): BASE,
    ("token-cleaning", "live"): STUDENT + BASE + TEACHER,
    ("token-cleaning", "frozen-target"): BASE + TEACHER,
    ("token-cleaning", "frozen-weight"): BASE + TEACHER,
    ("contrast", "live"): BASE + TEACHER,
    ("contrast", "frozen-target"): BASE + TEACHER,
    ("idft", "live"): STUDENT,
    ("trsft", "live"): STUDENT,
}
PAIRS = sorted(NEEDS)
FORMS = {name: [form for each, form in PAIRS if each == name] for name, _ in PAIRS}

DEFAULTS: dict[str, Parameters] = {
    "sft": {},
    "dft": {},
    "beyond-log": {"alpha": 8},
    "profit": {"tau": 0.1},
    "eaft": {"a": 1},
    "iw-sft": {"T": 1},
    "cft": {},
    "label-smoothing": {"lam": 0.1},
    "sft+kl": {"lam": 0.1},
    "asft": {"lam": 0.1},
    "psft": {"eps_hi": 0.28},
    "gem": {"beta": 0.7, "h": "linear"},
    "kd": {},
    "kd-hybrid": {"lam": 0.5},
    "target-sft": {"eta": 0.5},
    "gift": {"beta": 20},
    "flow": {},
    "stm": {"tau": 0.4},
    "token-cleaning": {"keep": 0.6},
    "contrast": {"alpha": 0.2, "beta": 0.4},
    "idft": {"beta": 1},
    "trsft": {"tau": 0.1},
}
# what is given besides nothing at all
VARIANTS: dict[str, list[Parameters]] = {
    "beyond-log": [{"alpha": 1}, {"alpha": 10}, {"alpha": 0.3}],
    "profit": [{"tau": 0.5}, {"tau": 1}],
    "eaft": [{"a": 0}, {"a": 0.5}, {"a": 2}],
    "iw-sft": [{"T": 0}, {"T": 0.3}, {"T": 2}],
    "label-smoothing": [{"lam": 0}, {"lam": 0.3}, {"lam": 1}],
    "sft+kl": [{"lam": 0}, {"lam": 1.5}],
    "asft": [{"lam": 0}, {"lam": 0.05}, {"lam": 2}],
    "psft": [{"eps_hi": 0}, {"eps_hi": 0.2}, {"eps_hi": 3}],
    "gem": [{"h": "logsigmoid"}, {"beta": 1.5}, {"beta": 0.3, "h": "logsigmoid"}],
    "kd-hybrid": [{"lam": 0}, {"lam": 0.1}, {"lam": 1}],
    "target-sft": [{"eta": 0}, {"eta": 0.3}, {"eta": 1}],
    "gift": [{"beta": 0}, {"beta": 0.5}, {"beta": 5}, {"beta": 500}],
    "flow": [{"tau": 0.2}, {"tau": 1}, {"tau": 4}],
    "stm": [{"tau": 0.1}, {"tau": 0.9}],
    "token-cleaning": [
        {"keep": 0},
        {"keep": 0.25},
        {"keep": 1},
        {"threshold": 0.3},
        {"threshold": -1, "keep": 0.1},
    ],
    "contrast": [{"alpha": 0.5, "beta": 0.1}, {"alpha": 1e-6, "beta": 0}, {"alpha": 1}],
    "idft": [{"beta": 0.5}, {"beta": 4}],
    "trsft": [{"tau": 0.5}, {"tau": 1}],
}


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
        models = models or NEEDS[name, form] or ("student" if form == "live" else "base",)
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
