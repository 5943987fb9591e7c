"""The table of target methods, a row for each, and the choice of one.

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
from . import divergences, rules
from .definition import FROZEN, Choice, Form, Method, Parameter, Statistic
from .dense import dense
from .rules import Array, constant

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
        parameter = known.get(_SPELLINGS.get(key, key))
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


def _middle(count: int, _: Mapping[str, Any]) -> tuple[int, ...]:
    return ((count - 1) // 2, count // 2) if count else ()


def _first_kept(count: int, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    kept = int(count * parameters["keep"])
    return (count - kept,) if kept else ()


_LAMBDA = Parameter("lam", 0.1)
_SHARE = Parameter("lam", 0.1, 0.0, 1.0)
_ONE_MINUS_LAMBDA = constant("1-lam", lambda parameters: 1 - parameters["lam"])
_ALL: tuple[Form, ...] = ("frozen-target", "frozen-weight", "live")
_BY_WEIGHT: tuple[Form, ...] = ("frozen-weight", "frozen-target", "live")
_IS_SFT: Mapping[Form, str] = dict.fromkeys(
    FROZEN, "with the base as reference the ratio is 1 everywhere: that is sft"
)
_HALF_LAMBDA = Parameter("lam", 0.5, 0.0, 1.0)
_SKEW = Parameter("alpha", 0.1, 1e-3, 0.999)


def _minimised(
    name: str, divergence: divergences.Divergence, *parameters: Parameter, source: str
) -> Method:
    """A divergence from the teacher as the loss."""
    return Method(
        name,
        constant(f"loss {divergence.formula}", lambda _: 0.0),
        "teacher",
        parameters=parameters,
        forms=("live",),
        refused=dict.fromkeys(
            FROZEN, "its gradient is not that of a cross-entropy to a fixed target: take kd"
        ),
        source=source,
        divergence=divergence,
    )


_ROWS = (
    Method("sft", forms=_ALL, source="maximum likelihood"),
    Method("dft", rules.likelihood, "student", forms=_ALL, source="arXiv 2508.05629"),
    Method(
        "beyond-log",
        rules.likelihood_power,
        "student",
        parameters=(Parameter("alpha", 8.0, above=True),),
        forms=_ALL,
        source="arXiv 2510.00526",
    ),
    Method(
        "profit",
        rules.likely,
        "student",
        parameters=(Parameter("tau", 0.1, 0.0, 1.0, above=True),),
        forms=_ALL,
        source="arXiv 2601.09195",
    ),
    Method(
        "eaft",
        rules.entropy_power,
        "student",
        parameters=(Parameter("a", 1.0),),
        forms=_ALL,
        source="arXiv 2601.02151",
    ),
    Method(
        "iw-sft",
        scale=rules.sequence_weight,
        parameters=(Parameter("T", 1.0),),
        forms=("live",),
        refused=_IS_SFT,
        source="arXiv 2507.12856",
    ),
    Method("cft", rules.masked, "student", forms=_BY_WEIGHT, source="arXiv 2510.10974"),
    Method(
        "label-smoothing",
        _ONE_MINUS_LAMBDA,
        "uniform",
        parameters=(_SHARE,),
        source="arXiv 1512.00567",
    ),
    Method(
        "sft+kl",
        constant("1/(1+lam)", lambda parameters: 1 / (1 + parameters["lam"])),
        "base",
        scale=constant("1+lam", lambda parameters: 1 + parameters["lam"]),
        parameters=(_LAMBDA,),
        source="arXiv 2509.04259",
    ),
    Method(
        "asft",
        rules.anchored_trust,
        "base",
        scale=rules.anchored_scale,
        parameters=(_LAMBDA,),
        source="arXiv 2509.23753",
    ),
    Method(
        "psft",
        scale=rules.proximal_weight,
        parameters=(Parameter("eps_hi", 0.28),),
        forms=("live",),
        refused=_IS_SFT,
        source="arXiv 2508.17784",
    ),
    Method(
        "gem",
        constant(
            "gradient a-(sum a)delta_y, a = softmax(z/beta)[sigmoid(0.01(z-z_y))]", lambda _: 1.0
        ),
        "gem",
        parameters=(
            Parameter("beta", 0.7, above=True),
            Parameter("h", "linear", words=("linear", "logsigmoid")),
        ),
        forms=("live",),
        refused={
            "frozen-target": "with the base's gradient at every step the loss has no lower bound",
            "frozen-weight": "it is not a weighted likelihood",
        },
        source="arXiv 2408.16673",
    ),
    Method("kd", rules.ZERO, "teacher", source="arXiv 1503.02531"),
    Method(
        "kd-hybrid",
        _ONE_MINUS_LAMBDA,
        "teacher",
        parameters=(_HALF_LAMBDA,),
        source="arXiv 1503.02531",
    ),
    Method(
        "target-sft",
        rules.likelihood,
        "mixture",
        parameters=(Parameter("eta", 0.5, 0.0, 1.0),),
        source="arXiv 2606.11189",
    ),
    _minimised("reverse-kl", divergences.reverse_kl, source="arXiv 2306.08543"),
    _minimised(
        "mixed-kl", divergences.mixed_kl, Parameter("lam", 0.5, 0.0, 1.0), source="arXiv 2404.02657"
    ),
    _minimised(
        "jsd",
        divergences.jensen_shannon,
        Parameter("beta", 0.5, 0.0, 1.0),
        source="arXiv 2306.13649",
    ),
    _minimised("skew-kl", divergences.skew_kl, _SKEW, source="arXiv 2402.03898"),
    _minimised("skew-reverse-kl", divergences.skew_reverse_kl, _SKEW, source="arXiv 2402.03898"),
    Method(
        "gift",
        rules.gift_trust,
        "base",
        parameters=(Parameter("beta", 20.0, 0.0, 500.0),),
        source="arXiv 2601.09233",
    ),
    Method(
        "flow",
        rules.flow_trust,
        "student",
        parameters=(Parameter("tau", None, above=True),),
        forms=_BY_WEIGHT,
        statistic=Statistic("tau", rules.base_loss, _middle),
        source="arXiv 2502.02797",
    ),
    Method(
        "stm",
        rules.base_likely,
        "student",
        parameters=(Parameter("tau", 0.4, 0.0, 1.0, above=True),),
        forms=_BY_WEIGHT,
        source="arXiv 2501.14315",
    ),
    Method(
        "token-cleaning",
        rules.worth_learning,
        "student",
        parameters=(Parameter("keep", 0.6, 0.0, 1.0), Parameter("threshold", None, -1e6, 1e6)),
        forms=_BY_WEIGHT,
        statistic=Statistic("threshold", rules.excess_loss, _first_kept, otherwise=1e6),
        source="arXiv 2502.01968",
    ),
    Method(
        "contrast",
        rules.ZERO,
        "contrast",
        scale=rules.divergent,
        parameters=(Parameter("alpha", 0.2, 0.0, 1.0, above=True), Parameter("beta", 0.4)),
        source="arXiv 2510.07962",
    ),
    Method(
        "idft",
        rules.tempered_likelihood,
        "student",
        parameters=(Parameter("beta", 1.0, above=True),),
        forms=("live",),
        refused=dict.fromkeys(
            FROZEN, "it needs the entropy over the whole vocabulary, which scores do not hold"
        ),
        source="arXiv 2602.12222",
    ),
    Method(
        "trsft",
        rules.trust_region,
        "student",
        parameters=(Parameter("tau", 0.1, 0.0, 1.0, above=True),),
        forms=("live",),
        refused=dict.fromkeys(
            FROZEN, "its region is around the model as it trains: take dft or profit"
        ),
        source="trust-region SFT",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}

DEFAULT_METHOD = "sft+kl"
DEFAULT_METHOD_WITH_TEACHER = "kd"


def choices() -> Iterator[Choice]:
    """Yield every method in every form with default parameters; build-targets' form first."""
    for method in METHODS.values():
        for form in method.forms:
            yield choose(method.name, form)
