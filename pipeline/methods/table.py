"""The target methods and the choice of one; `rows` holds their rows.

The target at a supervised position is Q = γ·δ_y + (1 − γ)·π̃, and the loss s·CE(Q, p): the trust γ
in the observed token y, the residual π̃ for the rest, and the scale s of the token's loss. γ, π̃ and
s have no gradient. p is the student in training, b the frozen base, q a frozen teacher. The form is
from "A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design", arXiv
2606.11189; the first fifteen methods are those of its table.

A rule that reads p in its paper has up to three forms, which are different methods:

- live: reads the student as it trains, as in the papers. If π̃ is p too, the residual has no
  gradient, and the loss is s·γ·NLL.
- frozen-target: b replaces p in γ and π̃. Training stops at a soft fixed point, as with an anchor.
- frozen-weight: the loss is s·γ(b)·NLL. Its fixed point is one-hot; only the speed differs.

All three have the same gradient while the student equals the base. For a method that does not read
the student, live and frozen-target are the same, unless its π̃ is p.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from ..errors import UserError
from .definition import Choice, Form, Method
from .dense import dense
from .rows import ROWS
from .rules import Array

_SPELLINGS = {
    "λ": "lam",
    "lambda": "lam",
    "α": "alpha",
    "β": "beta",
    "η": "eta",
    "τ": "tau",
    "ε": "eps_hi",
    "eps": "eps_hi",
    "epsilon": "eps_hi",
}


def spelled(parameter: str) -> str:
    """The name of a parameter as the table has it, from another spelling such as a Greek letter."""
    return _SPELLINGS.get(parameter, parameter)


def choose(name: str, form: str | None = None, given: Mapping[str, Any] | None = None) -> Choice:
    """Choose a method, its form and its parameters.

    Raises UserError for an unknown method or parameter, a form that the method does not have, and a
    value out of range.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    known = {parameter.name: parameter for parameter in method.parameters}
    defaults = {p.name: p.default for p in method.parameters if p.default is not None}
    settled: dict[str, float | str] = {}
    for key, value in (given or {}).items():
        parameter = known.get(spelled(key))
        if parameter is None:
            names = ", ".join(known) or "none"
            raise UserError(f"{name} has no parameter {key!r}: its parameters: {names}")
        if parameter.name in settled:
            raise UserError(f"{name}: {parameter.name} is given twice, the second time as {key}")
        settled[parameter.name] = parameter.parse(name, value)
    return Choice(method, _form(method, form), defaults | settled)


def _form(method: Method, form: str | None) -> Form:
    if form is None:
        return method.forms[0]
    if form in method.forms:
        return cast(Form, form)
    reason = method.refused.get(cast(Form, form), "")
    reason = f" ({reason})" if reason else ""
    raise UserError(
        f"{method.name} has no form {form!r}{reason}: choose one of {', '.join(method.forms)}"
    )


def dense_target(
    name: str,
    *,
    form: str = "live",
    student_log_probs: Array = None,
    base_log_probs: Array = None,
    teacher_log_probs: Array = None,
    observed: Array,
    mask: Array = None,
    **params: Any,
) -> tuple[Array, Array]:
    """The target over the whole vocabulary, [..., V], and the scale, [...]: the plain reference.

    Log-probabilities [..., V] are in nats and observed ids [...], both of numpy or torch. The last
    axis of `observed` is one example (iw-sft takes its mean over it), all of it one data set (flow
    and token-cleaning take their statistic of it, unless it is given). The gradient of the loss
    with respect to the logits is scale·(p − target). The targets of gem and of the divergences, p
    minus their gradient, may have negative entries.

    Raises UserError if a model that the method reads is not given, and as `choose` does.
    """
    models = {"student": student_log_probs, "base": base_log_probs, "teacher": teacher_log_probs}
    return dense(choose(name, form, params), models, observed, mask)


METHODS: dict[str, Method] = {method.name: method for method in ROWS}

DEFAULT_METHOD = "sft+kl"
DEFAULT_METHOD_WITH_TEACHER = "kd"


def choices() -> Iterator[Choice]:
    """Yield every method in every form with default parameters; build-targets' form first."""
    for method in METHODS.values():
        for form in method.forms:
            yield choose(method.name, form)
