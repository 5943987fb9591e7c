"""The table of target methods: the one place where a method is described.

At every supervised position the target is Q = γ·δ_y + (1 − γ)·π̃, and the loss s·CE(Q, p), with no
gradient through γ, π̃ and s: how far to trust the observed token y, where the rest goes, and a
per-token scale. p is the student as it trains, b the frozen base prior, q a frozen teacher. The
frame is of "A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design", arXiv
2606.11189, and the first fifteen methods are those of its table.

A rule that reads p in its paper comes in up to three forms, which are different methods:

- live: it reads the student as it trains, which is what the papers do. Where π̃ is p too, the
  residual has no gradient: the loss is s·γ·NLL.
- frozen-target: b stands for p, in γ and in π̃. It stops at a soft fixed point, like an anchor.
- frozen-weight: the loss is s·γ(b)·NLL. Its fixed point is one-hot; only the speed changes.

All three have the same gradient while the student is the base. A method that reads no student has
one and the same meaning in the live and the frozen-target form, unless its π̃ is p.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from ..errors import UserError
from . import rules
from .definition import FROZEN, Choice, Form, Method, Parameter, Statistic
from .dense import dense
from .rules import ONE, Array, constant

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
    """Settle a method's form and parameters.

    Raises UserError for an unknown method, a form that it does not have, an unknown parameter, or
    one that is out of its range.
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

    Log-probabilities [..., V] in nats and observed ids [...], of numpy or torch; the last axis of
    `observed` is one example (iw-sft takes its mean over it), all of it one data set (for flow and
    token-cleaning, unless their statistic is given). The gradient of the loss with respect to the
    logits is scale·(p − target). gem's target alone has negative entries: p minus its gradient.

    Raises UserError where a model that the method reads is not given, and as `choose` does.
    """
    models = {"student": student_log_probs, "base": base_log_probs, "teacher": teacher_log_probs}
    return dense(choose(name, form, params), models, observed, mask)


def _reads(*names: str) -> frozenset[str]:
    return frozenset(names)


def _middle(count: int, _: Mapping[str, Any]) -> tuple[int, ...]:
    return ((count - 1) // 2, count // 2) if count else ()


def _first_kept(count: int, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    kept = int(count * parameters["keep"])
    return (count - kept,) if kept else ()


_LAMBDA = Parameter("lam", 0.1)
_SHARE = Parameter("lam", 0.1, 0.0, 1.0)
_ALL: tuple[Form, ...] = ("frozen-target", "frozen-weight", "live")
_BY_WEIGHT: tuple[Form, ...] = ("frozen-weight", "frozen-target", "live")
_NO_WEIGHT: Mapping[Form, str] = {
    "frozen-weight": "a weight alone would drop its residual, and with it what it is for"
}
_IS_SFT: Mapping[Form, str] = dict.fromkeys(
    FROZEN, "with the base as reference the ratio is 1 everywhere: that is sft"
)

_ROWS = (
    Method(
        name="sft",
        trust=ONE,
        trust_formula="1",
        residual="observed",
        forms=_ALL,
        source="maximum likelihood",
    ),
    Method(
        name="dft",
        trust=rules.likelihood,
        trust_formula="p_y",
        residual="student",
        reads=_reads("log_prob"),
        forms=_ALL,
        source="arXiv 2508.05629",
    ),
    Method(
        name="beyond-log",
        trust=rules.likelihood_power,
        trust_formula="p_y^alpha",
        residual="student",
        reads=_reads("log_prob"),
        parameters=(Parameter("alpha", 8.0, above=True),),
        forms=_ALL,
        source="arXiv 2510.00526",
    ),
    Method(
        name="profit",
        trust=rules.likely,
        trust_formula="1 if p_y >= tau, else 0",
        residual="student",
        reads=_reads("log_prob"),
        parameters=(Parameter("tau", 0.1, 0.0, 1.0, above=True),),
        forms=_ALL,
        source="arXiv 2601.09195",
    ),
    Method(
        name="eaft",
        trust=rules.entropy_power,
        trust_formula="(H_20/3)^a",
        residual="student",
        reads=_reads("top_entropy"),
        parameters=(Parameter("a", 1.0),),
        forms=_ALL,
        source="arXiv 2601.02151",
    ),
    Method(
        name="iw-sft",
        trust=ONE,
        trust_formula="1",
        residual="observed",
        scale=rules.sequence_weight,
        scale_formula="min(16, exp(T mean_t log(p_y/b_y)))",
        reads=_reads("sequence_log_ratio"),
        parameters=(Parameter("T", 1.0),),
        forms=("live",),
        refused=_IS_SFT,
        source="arXiv 2507.12856",
    ),
    Method(
        name="cft",
        trust=rules.masked,
        trust_formula="mask",
        residual="student",
        reads=_reads("mask"),
        forms=_BY_WEIGHT,
        source="arXiv 2510.10974",
    ),
    Method(
        name="label-smoothing",
        trust=constant(lambda parameters: 1 - parameters["lam"]),
        trust_formula="1-lam",
        residual="uniform",
        parameters=(_SHARE,),
        refused=_NO_WEIGHT,
        source="arXiv 1512.00567",
    ),
    Method(
        name="sft+kl",
        trust=constant(lambda parameters: 1 / (1 + parameters["lam"])),
        trust_formula="1/(1+lam)",
        residual="base",
        scale=constant(lambda parameters: 1 + parameters["lam"]),
        scale_formula="1+lam",
        parameters=(_LAMBDA,),
        refused=_NO_WEIGHT,
        source="arXiv 2509.04259",
    ),
    Method(
        name="asft",
        trust=rules.anchored_trust,
        trust_formula="p_y/(p_y+lam)",
        residual="base",
        scale=rules.anchored_scale,
        scale_formula="p_y+lam",
        reads=_reads("log_prob"),
        parameters=(_LAMBDA,),
        refused=_NO_WEIGHT,
        source="arXiv 2509.23753",
    ),
    Method(
        name="psft",
        trust=ONE,
        trust_formula="1",
        residual="observed",
        scale=rules.proximal_weight,
        scale_formula="r if r <= 1+eps_hi, else 0; r = p_y/b_y",
        reads=_reads("log_prob", "base_log_prob"),
        parameters=(Parameter("eps_hi", 0.28),),
        forms=("live",),
        refused=_IS_SFT,
        source="arXiv 2508.17784",
    ),
    Method(
        name="gem",
        trust=ONE,
        trust_formula="gradient a-(sum a)delta_y, a = softmax(z/beta)[sigmoid(0.01(z-z_y))]",
        residual="gem",
        parameters=(
            Parameter("beta", 0.7, above=True),
            Parameter("h", "linear", words=("linear", "logsigmoid")),
        ),
        forms=("live",),
        refused={
            "frozen-target": "with the base's gradient at every step the loss has no lower bound",
            "frozen-weight": "it is no weighted likelihood",
        },
        source="arXiv 2408.16673",
    ),
    Method(
        name="kd",
        trust=constant(lambda _: 0.0),
        trust_formula="0",
        residual="teacher",
        refused=_NO_WEIGHT,
        source="arXiv 1503.02531",
    ),
    Method(
        name="kd-hybrid",
        trust=constant(lambda parameters: 1 - parameters["lam"]),
        trust_formula="1-lam",
        residual="teacher",
        parameters=(Parameter("lam", 0.5, 0.0, 1.0),),
        refused=_NO_WEIGHT,
        source="arXiv 1503.02531",
    ),
    Method(
        name="target-sft",
        trust=rules.likelihood,
        trust_formula="p_y",
        residual="mixture",
        reads=_reads("log_prob"),
        parameters=(Parameter("eta", 0.5, 0.0, 1.0),),
        refused=_NO_WEIGHT,
        source="arXiv 2606.11189",
    ),
    Method(
        name="gift",
        trust=rules.gift_trust,
        trust_formula="b_y(e^beta-1)/(1+b_y(e^beta-1))",
        residual="base",
        reads=_reads("base_log_prob"),
        parameters=(Parameter("beta", 20.0, 0.0, 500.0),),
        refused=_NO_WEIGHT,
        source="arXiv 2601.09233",
    ),
    Method(
        name="flow",
        trust=rules.flow_trust,
        trust_formula="b_y^(1/tau)",
        residual="student",
        reads=_reads("base_log_prob"),
        parameters=(Parameter("tau", None, above=True),),
        forms=_BY_WEIGHT,
        statistic=Statistic(
            "tau", _reads("base_log_prob"), lambda signals: -signals.base_log_prob, _middle
        ),
        source="arXiv 2502.02797",
    ),
    Method(
        name="stm",
        trust=rules.base_likely,
        trust_formula="1 if b_y >= tau, else 0",
        residual="student",
        reads=_reads("base_log_prob"),
        parameters=(Parameter("tau", 0.4, 0.0, 1.0, above=True),),
        forms=_BY_WEIGHT,
        source="arXiv 2501.14315",
    ),
    Method(
        name="token-cleaning",
        trust=rules.worth_learning,
        trust_formula="1 if log(q_y/b_y) >= threshold, else 0",
        residual="student",
        reads=_reads("base_log_prob", "teacher_log_prob"),
        parameters=(Parameter("keep", 0.6, 0.0, 1.0), Parameter("threshold", None, -1e6, 1e6)),
        forms=_BY_WEIGHT,
        statistic=Statistic(
            "threshold",
            _reads("base_log_prob", "teacher_log_prob"),
            rules.excess_loss,
            _first_kept,
            otherwise=1e6,
        ),
        source="arXiv 2502.01968",
    ),
    Method(
        name="contrast",
        trust=constant(lambda _: 0.0),
        trust_formula="0",
        residual="contrast",
        scale=rules.divergent,
        scale_formula="1 if KL(q,b) >= beta, else 0",
        reads=_reads("divergence"),
        parameters=(Parameter("alpha", 0.2, 0.0, 1.0, above=True), Parameter("beta", 0.4)),
        refused=_NO_WEIGHT,
        source="arXiv 2510.07962",
    ),
    Method(
        name="idft",
        trust=rules.tempered_likelihood,
        trust_formula="p_y^clip(exp(-(log p_y+H)/beta), 0.1, 2)",
        residual="student",
        reads=_reads("log_prob", "entropy"),
        parameters=(Parameter("beta", 1.0, above=True),),
        forms=("live",),
        refused=dict.fromkeys(
            FROZEN, "it needs the entropy over the whole vocabulary, which scores do not hold"
        ),
        source="arXiv 2602.12222",
    ),
    Method(
        name="trsft",
        trust=rules.trust_region,
        trust_formula="min(1, p_y/tau)",
        residual="student",
        reads=_reads("log_prob"),
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
    """Every method in every form, with its defaults, the form of build-targets first."""
    for method in METHODS.values():
        for form in method.forms:
            yield choose(method.name, form)
