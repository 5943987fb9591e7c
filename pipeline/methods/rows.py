"""The table of target methods, a row for each.

`table` states what a row means.
"""

import math
from collections.abc import Mapping
from typing import Any

from . import divergences, rules
from .definition import FROZEN, Form, Method, Parameter, Statistic
from .rules import Rule, constant


def _middle(count: int, _: Mapping[str, Any]) -> tuple[int, ...]:
    return ((count - 1) // 2, count // 2) if count else ()


def _first_kept(count: int, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    kept = int(count * parameters["keep"])
    return (count - kept,) if kept else ()


def _first_kept_rounded_up(count: int, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    kept = math.ceil(count * parameters["keep"])
    return (count - kept,) if kept else ()


_LAMBDA = Parameter("lam", 0.1)
_SHARE = Parameter("lam", 0.1, 0.0, 1.0)
_ONE_MINUS_LAMBDA = constant("1-lam", lambda parameters: 1 - parameters["lam"])
_ALL: tuple[Form, ...] = ("frozen-target", "frozen-weight", "live")
_BY_WEIGHT: tuple[Form, ...] = ("frozen-weight", "frozen-target", "live")
_IS_SFT: Mapping[Form, str] = dict.fromkeys(
    FROZEN, "with the base as reference the ratio is 1 everywhere: that is sft"
)
_IS_WEIGHT: Mapping[Form, str] = {
    "frozen-target": "its residual is the observed token: that is frozen-weight"
}
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


def _selective(name: str, scale: Rule, values: Rule, *, source: str) -> Method:
    """kd at the share `keep` of all positions that have the highest values."""
    return Method(
        name,
        rules.ZERO,
        "teacher",
        scale,
        parameters=(Parameter("keep", 0.2, 0.0, 1.0), Parameter("threshold", None, -1e6, 1e6)),
        statistic=Statistic("threshold", values, _first_kept_rounded_up, otherwise=1e6),
        source=source,
    )


ROWS = (
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
    Method(
        "prift-prob",
        rules.base_likelihood,
        "student",
        forms=_BY_WEIGHT,
        source="arXiv 2606.09396",
    ),
    Method(
        "prift-mass",
        rules.supported,
        "student",
        parameters=(Parameter("tau", 0.5, 0.0, 1.0, above=True),),
        forms=_BY_WEIGHT,
        source="arXiv 2606.09396",
    ),
    Method(
        "infosft",
        scale=rules.information,
        parameters=(Parameter("P", 0.93, 0.501, 0.999999),),
        forms=("frozen-weight", "live"),
        refused=_IS_WEIGHT,
        source="arXiv 2605.14967",
    ),
    Method(
        "deft",
        rules.focused_likelihood,
        "student",
        forms=_ALL,
        source="arXiv 2602.11424",
    ),
    Method(
        "talr",
        rules.floored_likelihood,
        "student",
        parameters=(Parameter("tau", None, above=True), Parameter("floor", 0.01, 0.0, 1.0)),
        forms=_ALL,
        statistic=Statistic("tau", rules.base_loss, _middle),
        source="arXiv 2509.20758",
    ),
    Method(
        "ranktuner",
        scale=rules.relative_scale,
        parameters=(Parameter("power", 0.0),),
        forms=("frozen-weight", "live"),
        refused=_IS_WEIGHT,
        source="arXiv 2602.01745",
    ),
    _selective("se-kd", rules.uncertain, rules.base_uncertainty, source="arXiv 2602.01395"),
    _selective("tip", rules.important, rules.importance, source="arXiv 2604.14084"),
    Method(
        "amid",
        rules.ZERO,
        "mixture",
        parameters=(Parameter("eta", 0.5, 0.0, 1.0), Parameter("alpha", 0.0, -1.0, 5.0)),
        source="arXiv 2510.15982",
    ),
)
