"""The table of target methods: the one place where a method is described.

At every supervised position the target is Q = γ·δ_y + (1 − γ)·residual, and the loss s·CE(Q, p):
how far to trust the observed token, where the rest goes, and a per-token scale. The frame is of
"A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design", arXiv 2606.11189;
b is the frozen base prior, b_y its probability of the observed token.

A rule that reads the student in its paper reads the base prior here, in one of two forms:

- frozen-target: cross-entropy to γ(b)·δ_y + (1 − γ(b))·b, which stops at a soft fixed point;
- frozen-weight: γ(b)·NLL; its fixed point is one-hot, only the speed of learning changes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

Form = Literal["frozen-target", "frozen-weight"]
Residual = Literal["observed", "base", "uniform"]
Array = NDArray[np.float64]
Rule = Callable[[Array, Mapping[str, float]], Array]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method and the closed range it may be given in."""

    name: str
    default: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    `trust` and `scale` take log b_y [N] in nats and the parameters, and give γ [N] and s [N].
    """

    name: str
    trust: Rule
    trust_formula: str
    residual: Residual
    source: str
    scale: Rule = lambda log_prob, _: np.ones_like(log_prob)
    scale_formula: str = "1"
    parameters: tuple[Parameter, ...] = ()
    forms: tuple[Form, ...] = ("frozen-target",)


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its form and parameters settled."""

    method: Method
    form: Form
    parameters: dict[str, float]

    @property
    def residual(self) -> Residual:
        """Where the untrusted mass goes in this form."""
        return "observed" if self.form == "frozen-weight" else self.method.residual

    def trust_and_weight(self, observed_log_probs: NDArray[np.floating]) -> tuple[Array, Array]:
        """γ and the loss weight at each position, [N] each, from log b_y [N] in nats."""
        log_prob = np.minimum(observed_log_probs.astype(np.float64), 0)  # rounding may exceed it
        trust = self.method.trust(log_prob, self.parameters)
        scale = self.method.scale(log_prob, self.parameters)
        if self.form == "frozen-weight":
            return np.ones_like(trust), scale * trust
        return trust, scale


def choose(name: str, form: str | None = None, given: Mapping[str, float] | None = None) -> Choice:
    """Settle a method's form and parameters.

    Raises UserError for an unknown method, a form that it does not have, an unknown parameter, or
    one that is out of its range.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    forms: dict[str | None, Form] = {known: known for known in method.forms}
    chosen_form = method.forms[0] if form is None else forms.get(form)
    if chosen_form is None:
        raise UserError(f"{name} has no form {form!r}: choose one of {', '.join(method.forms)}")
    ranges = {parameter.name: parameter for parameter in method.parameters}
    for key, value in (given or {}).items():
        if key not in ranges:
            known = ", ".join(ranges) or "none"
            raise UserError(f"{name} has no parameter {key!r}: its parameters: {known}")
        low, high = ranges[key].low, ranges[key].high
        if not low <= value <= high:  # also refuses NaN
            raise UserError(f"{name}: {key}={value:g} is out of range: give {low:g} to {high:g}")
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    floats = {key: float(value) for key, value in (given or {}).items()}
    return Choice(method, chosen_form, defaults | floats)


def _gift_trust(log_prob: Array, parameters: Mapping[str, float]) -> Array:
    # the mass that softmax(log b + β·δ_y) adds to y, as odds: b_y·(e^β − 1)
    floored = np.maximum(log_prob, math.log(1e-10))
    odds = np.exp(floored) * math.expm1(parameters["beta"])
    return odds / (1 + odds)


_LAMBDA = Parameter("lam", 0.1, 0.0, 1e6)

_ROWS = (
    Method(
        name="sft",
        trust=lambda log_prob, _: np.ones_like(log_prob),
        trust_formula="1",
        residual="observed",
        source="maximum likelihood",
    ),
    Method(
        name="dft",
        trust=lambda log_prob, _: np.exp(log_prob),
        trust_formula="b_y",
        residual="base",
        forms=("frozen-target", "frozen-weight"),
        source="arXiv 2508.05629",
    ),
    Method(
        name="sft+kl",
        trust=lambda log_prob, parameters: np.full_like(log_prob, 1 / (1 + parameters["lam"])),
        trust_formula="1/(1+lam)",
        residual="base",
        scale=lambda log_prob, parameters: np.full_like(log_prob, 1 + parameters["lam"]),
        scale_formula="1+lam",
        parameters=(_LAMBDA,),
        source="arXiv 2509.04259",
    ),
    Method(
        name="label-smoothing",
        trust=lambda log_prob, parameters: np.full_like(log_prob, 1 - parameters["lam"]),
        trust_formula="1-lam",
        residual="uniform",
        parameters=(Parameter("lam", 0.1, 0.0, 1.0),),
        source="arXiv 1512.00567",
    ),
    Method(
        name="gift",
        trust=_gift_trust,
        trust_formula="b_y(e^beta-1)/(1+b_y(e^beta-1))",
        residual="base",
        parameters=(Parameter("beta", 20.0, 0.0, 500.0),),
        source="arXiv 2601.09233",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}

DEFAULT_METHOD = "sft+kl"


def table() -> list[dict[str, Any]]:
    """The table as rows of words, for the command line and the README."""
    return [
        {
            "name": method.name,
            "trust": method.trust_formula,
            "residual": {"observed": "-", "base": "b", "uniform": "1/V"}[method.residual],
            "scale": method.scale_formula,
            "parameters": ", ".join(f"{p.name}={p.default:g}" for p in method.parameters) or "-",
            "forms": ", ".join(method.forms),
            "source": method.source,
        }
        for method in METHODS.values()
    ]
