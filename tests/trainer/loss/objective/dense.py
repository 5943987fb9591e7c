"""Every method's loss and gradient as dense float64 arithmetic, from the formulas of its row.

p is the student, b the base, q the teacher. N positions, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from qpipe.tests.support import divergences
from qpipe.tests.support.methods import DIVERGENCES, FACTS, FORMULAS, Token
from torch import Tensor
from torch.nn.functional import one_hot

V = 31  # above the twenty that eaft looks at
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@dataclass(frozen=True)
class Models:
    """Three models at N positions of some examples."""

    p: Tensor  # [N, V]
    b: Tensor  # [N, V]
    q: Tensor  # [N, V]
    observed: Tensor  # [N]
    example_of: Tensor  # [N]

    def at_observed(self, probs: Tensor) -> Tensor:
        return probs[torch.arange(len(probs)), self.observed]

    @property
    def one_hot(self) -> Tensor:
        return one_hot(self.observed, V).double()


class Rule(NamedTuple):
    """γ, s and π̃ at each position."""

    trust: Tensor  # [N]
    scale: Tensor  # [N]
    residual: Tensor  # [N, V]


def rule_of(name: str, models: Models, given: dict[str, Any]) -> Rule:
    """The row of the table; `models.p` is the followed model, whichever that is."""
    log_ratio_N = models.at_observed(models.p).log() - models.at_observed(models.b).log()
    mean_of = {
        example: float(log_ratio_N[models.example_of == example].mean())
        for example in models.example_of.unique().tolist()
    }
    columns = (models.p.log(), models.b.log(), models.q.log(), models.observed, mask_of(models))
    means = [mean_of[example] for example in models.example_of.tolist()]
    rows = [
        FORMULAS[name](Token(*row), given)
        for row in zip(*(column.tolist() for column in columns), means, strict=True)
    ]
    trust, residual, scale = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    return Rule(trust, scale, residual)


def mask_of(models: Models) -> Tensor:
    """A mask that comes with the demonstrations, of 0, 0.5 and 1."""
    return models.observed % 3 / 2.0


def gem_weights(models: Models, beta: float, h: str) -> Tensor:
    """a of gem, [N, V]."""
    sharpened = models.p ** (1 / beta)
    weights = sharpened / sharpened.sum(1, keepdim=True)
    if h == "linear":
        return weights
    odds = models.p / models.at_observed(models.p)[:, None]
    return weights * odds**0.01 / (1 + odds**0.01)  # σ(0.01·log odds)


def dense_loss(
    name: str, form: str, parameters: dict[str, Any], models: Models
) -> tuple[Tensor, Tensor]:
    """The losses [N] and the gradient of their sum with respect to the logits [N, V]."""
    p, delta = models.p, models.one_hot
    nll = -models.at_observed(p).log()
    if name == "gem":
        pull = gem_weights(models, **parameters)
        losses = (pull * (p.log() + nll[:, None])).sum(1)
        return losses, pull - pull.sum(1, keepdim=True) * delta
    if name in DIVERGENCES:
        pairs = list(zip(p.log().tolist(), models.q.log().tolist(), strict=True))
        values = [divergences.value(name, *pair, parameters) for pair in pairs]
        gradients = [divergences.gradient(name, *pair, parameters) for pair in pairs]
        return torch.tensor(values, dtype=torch.float64), torch.tensor(
            gradients, dtype=torch.float64
        )
    followed = models if form == "live" else replace(models, p=models.b)
    rule = rule_of(name, followed, parameters)
    weight = rule.scale * rule.trust
    if "w" in FACTS[name, form].letters:
        return weight * nll, weight[:, None] * (p - delta)
    target = rule.trust[:, None] * delta + (1 - rule.trust[:, None]) * rule.residual
    cross_entropy = -(target * p.log()).sum(1)
    return rule.scale * cross_entropy, rule.scale[:, None] * (p - target)
