"""Every method's loss and gradient as dense float64 arithmetic, from its paper.

p is the student, b the base, q the teacher. N positions, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
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


@dataclass
class Rule:
    """γ, s and π̃ at each position; π̃ None where it is the followed model itself."""

    trust: Tensor  # [N]
    scale: Tensor  # [N]
    residual: Tensor | None  # [N, V]


def rule_of(name: str, models: Models, given: dict[str, Any]) -> Rule:
    """The row of the table; `models.p` is the followed model, whichever that is."""
    p, b, q = models.p, models.b, models.q
    p_y, b_y, q_y = (models.at_observed(probs) for probs in (p, b, q))
    one = torch.ones_like(p_y)
    match name:
        case "sft":
            return Rule(one, one, None)
        case "dft":
            return Rule(p_y, one, None)
        case "beyond-log":
            return Rule(p_y ** given["alpha"], one, None)
        case "profit":
            return Rule((p_y >= given["tau"]).double(), one, None)
        case "eaft":
            top = p.sort(1, descending=True).values[:, :20]
            top = top / top.sum(1, keepdim=True)
            return Rule((-(top * top.log()).sum(1) / 3.0) ** given["a"], one, None)
        case "iw-sft":
            log_ratio = p_y.log() - b_y.log()
            means = torch.stack(
                [log_ratio[models.example_of == example].mean() for example in models.example_of]
            )
            return Rule(one, torch.exp(given["T"] * means).clamp(0, 16), None)
        case "label-smoothing":
            return Rule((1 - given["lam"]) * one, one, torch.full_like(p, 1 / V))
        case "sft+kl":
            return Rule(one / (1 + given["lam"]), (1 + given["lam"]) * one, b)
        case "asft":
            return Rule(p_y / (p_y + given["lam"]), p_y + given["lam"], b)
        case "psft":
            ratio = p_y / b_y
            return Rule(one, ratio * (ratio <= 1 + given["eps_hi"]), None)
        case "kd":
            return Rule(0 * one, one, q)
        case "kd-hybrid":
            return Rule((1 - given["lam"]) * one, one, q)
        case "target-sft":
            mixture = p ** (1 - given["eta"]) * q ** given["eta"]
            return Rule(p_y, one, mixture / mixture.sum(1, keepdim=True))
        case "gift":
            odds = b_y.clamp(min=1e-10) * (math.exp(given["beta"]) - 1)
            return Rule(odds / (1 + odds), one, b)
        case "flow":
            return Rule(b_y ** (1 / given["tau"]), one, None)
        case "stm":
            return Rule((b_y >= given["tau"]).double(), one, None)
        case "token-cleaning":
            return Rule((q_y / b_y >= math.exp(given["threshold"])).double(), one, None)
        case "cft":
            return Rule(mask_of(models), one, None)
        case "contrast":
            ratio = torch.where(q >= given["alpha"] * q.amax(1, keepdim=True), q / b, 0)
            divergence = (q * (q / b).log()).sum(1)
            scale = (divergence >= given["beta"]).double()
            return Rule(0 * one, scale, ratio / ratio.sum(1, keepdim=True))
        case "idft":
            entropy = -(p * p.log()).sum(1)
            power = torch.exp(-(p_y.log() + entropy) / given["beta"]).clip(0.1, 2)
            return Rule(p_y**power, one, None)
        case "trsft":
            return Rule((p_y / given["tau"]).clip(max=1), one, None)
    raise AssertionError(name)


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
    followed = models if form == "live" else replace(models, p=models.b)
    rule = rule_of(name, followed, parameters)
    gradient_of_nll = p - delta
    weight = rule.scale * rule.trust
    if form == "frozen-weight" or (form == "live" and rule.residual is None):
        return weight * nll, weight[:, None] * gradient_of_nll
    residual = followed.p if rule.residual is None else rule.residual
    target = rule.trust[:, None] * delta + (1 - rule.trust[:, None]) * residual
    if name == "sft":
        target = delta
    cross_entropy = -(target * p.log()).sum(1)
    return rule.scale * cross_entropy, rule.scale[:, None] * (p - target)
