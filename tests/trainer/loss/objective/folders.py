"""The methods and forms that are tried, and what a target folder would hold of each.

N positions, V vocabulary, S support entries.
"""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.tests.support.methods import DEFAULTS, FACTS, LIVE, NAMES, READS_STUDENT
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss.objective import Loss, Objective, objective_of
from torch import Tensor

from .dense import Models, V, rule_of

_MORE: dict[str, list[dict[str, Any]]] = {
    "beyond-log": [{"alpha": 0.5}],
    "eaft": [{"a": 2.5}],
    "iw-sft": [{"T": 12.0}],
    "asft": [{"lam": 2.0}],
    "gem": [{"beta": 0.7, "h": "logsigmoid"}],
    "target-sft": [{"eta": 0.2}, {"eta": 0.0}, {"eta": 1.0}],
    "mixed-kl": [{"lam": 0.2}],
    "jsd": [{"beta": 0.1}, {"beta": 0.0}, {"beta": 1.0}],
    "skew-kl": [{"alpha": 0.6}],
    "skew-reverse-kl": [{"alpha": 0.6}],
    "gift": [{"beta": 3.0}],
    "flow": [{"tau": 1.7}],
    "token-cleaning": [{"keep": 0.6, "threshold": 0.3}],
    "idft": [{"beta": 0.3}],
    "prift-mass": [{"tau": 0.1}],
    "infosft": [{"P": 0.7}],
    "talr": [{"tau": 1.7, "floor": 0.1}],
    "ranktuner": [{"power": 0.0}, {"power": 1.0}],
    "se-kd": [{"keep": 0.2, "threshold": 2.0}],
    "tip": [{"keep": 0.2, "threshold": 3.0}],
    "amid": [
        {"eta": 0.3, "alpha": -1.0},
        {"eta": 0.8, "alpha": 3.0},
        {"eta": 0.5, "alpha": 1.0},
    ],
}
_OF_DATA = (
    "flow",
    "token-cleaning",
    "talr",
    "se-kd",
    "tip",
)  # their default is a statistic of the data set
PARAMETERS = {
    name: [*([] if name in _OF_DATA else [DEFAULTS[name]]), *_MORE.get(name, [])] for name in NAMES
}

Case = tuple[str, str, dict[str, Any]]
CASES: list[Case] = [
    (name, form, parameters) for name, form in FACTS for parameters in PARAMETERS[name]
]
LIVE_CASES = [case for case in CASES if case[1] == LIVE and case[0] in READS_STUDENT]
FROZEN_CASES = [case for case in CASES if case[1] != LIVE]


def case_id(value: Any) -> str:
    return ",".join(map(str, value.values())) or "-" if isinstance(value, dict) else str(value)


over = partial(pytest.mark.parametrize, ("name", "form", "parameters"), ids=case_id)


def folder_settings(name: str, form: str, parameters: dict[str, Any]) -> dict[str, Any]:
    stored = FACTS[name, form].stored
    tail_shape = "uniform" if stored == "uniform" else "student"
    own = {"method": name, "form": form, "parameters": parameters}
    return own | {"residual": stored, "tail_shape": tail_shape}


def objective_for(name: str, form: str, parameters: dict[str, Any]) -> Objective:
    return objective_of(folder_settings(name, form, parameters), name)


def folder_targets(
    name: str, form: str, parameters: dict[str, Any], models: Models
) -> SparseTargets:
    """What build-targets would store, over the whole vocabulary."""
    frozen = replace(models, p=models.b)
    if form == "live" and name in READS_STUDENT:
        trust = weights = torch.ones(len(models.observed)).double()
    else:
        rule = rule_of(name, frozen, parameters)
        trust, weights = rule.trust, rule.scale
        if "w" in FACTS[name, form].letters:
            trust, weights = torch.ones_like(trust), rule.scale * rule.trust
    match FACTS[name, form].stored:
        case "observed":
            return of_observed(models, torch.ones_like(trust), trust, weights)
        case "base-observed":
            return of_observed(models, models.at_observed(models.b), trust, weights)
        case "uniform":
            return of_observed(models, torch.full_like(trust, 1 / V), trust, weights)
        case "base":
            residual = models.b
        case "teacher":
            residual = models.q
        case _:
            residual = rule_of(name, frozen, parameters).residual
    ids_NV = torch.argsort(torch.rand(residual.shape), dim=1)
    return SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=trust,
        weights=weights,
        support_ids=ids_NV,
        support_mask=torch.ones_like(ids_NV, dtype=torch.bool),
        support_probs=residual.gather(1, ids_NV),
        tail_mass=torch.zeros_like(trust),
    )


def of_observed(models: Models, probs: Tensor, trust: Tensor, weights: Tensor) -> SparseTargets:
    """A support of the observed token alone."""
    return SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=trust,
        weights=weights,
        support_ids=models.observed[:, None],
        support_mask=torch.ones(len(probs), 1, dtype=torch.bool),
        support_probs=probs[:, None],
        tail_mass=1 - probs,
    )


def random_models(count: int = 150, seed: int = 0, spread: float = 2.5) -> tuple[Tensor, Models]:
    """A student's logits, and it with a base and a teacher that are not far from it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    logits = torch.tensor(rng.normal(0, spread, (count, V)))
    b, q = (
        (logits + torch.tensor(rng.normal(0, spread / 2, (count, V)))).softmax(1) for _ in range(2)
    )
    p = logits.softmax(1)
    # the likeliest, any, or the least likely token
    rank = torch.tensor(rng.choice([0, 0, rng.integers(V), V - 1], count))
    observed = p.argsort(1, descending=True)[torch.arange(count), rank]
    example_of = torch.tensor(np.sort(rng.integers(0, 1 + count // 6, count)))
    return logits + 7 * torch.randn(count, 1).double(), Models(p, b, q, observed, example_of)


def loss_and_gradient(
    objective: Objective, logits_NV: Tensor, targets: SparseTargets
) -> tuple[Loss, Tensor]:
    leaf = logits_NV.detach().clone().requires_grad_()
    loss = objective(leaf, targets)
    (gradient,) = torch.autograd.grad(loss.sum, leaf)
    return loss, gradient


def to_dtype(targets: SparseTargets, dtype: torch.dtype) -> SparseTargets:
    """The same targets, their real numbers in another precision."""
    values = (getattr(targets, field.name) for field in fields(targets))
    return SparseTargets(*(v.to(dtype) if v.is_floating_point() else v for v in values))
