"""The divergences a second time: value and gradient over outcomes, in plain float64.

p is the student, q the teacher, both as lists of log-probabilities.
"""

import math
from collections.abc import Callable

from .methods import Parameters

LEAST = 2.0**-126  # a q below counts as this where it stands under a fraction line
Gradient = list[float]


def value(name: str, log_p: list[float], log_q: list[float], given: Parameters) -> float:
    pairs = zip(map(math.exp, log_p), map(math.exp, log_q), strict=True)
    return math.fsum(_VALUES[name](p, q, given) for p, q in pairs)


def gradient(name: str, log_p: list[float], log_q: list[float], given: Parameters) -> Gradient:
    """With respect to the logits: p_k·(u_k − E_p u), u the derivative by p_k."""
    p, q = [math.exp(each) for each in log_p], [math.exp(each) for each in log_q]
    pulls = [_PULLS[name](*pair, given) for pair in zip(p, q, strict=True)]
    total = math.fsum(pulls)
    return [pull - share * total for pull, share in zip(pulls, p, strict=True)]


def bound(name: str, p_tail: float, q_tail: float, given: Parameters) -> float:
    """Of the distance of the gradient on a support from that of the whole teacher."""
    ratio = q_tail / p_tail if p_tail else 0.0
    alpha, beta, lam = (given.get(key, 0.5) for key in ("alpha", "beta", "lam"))
    forward, reverse = 2 * q_tail, 0.0
    if p_tail and max(q_tail, LEAST) > LEAST:
        reverse = 2 * p_tail * math.log(q_tail / LEAST)
    match name:
        case "reverse-kl":
            return reverse
        case "mixed-kl":
            return (1 - lam) * forward + lam * reverse
        case "jsd" if 0 < beta < 1:
            return 2 * (1 - beta) * p_tail * math.log(1 + ratio * beta / (1 - beta))
        case "jsd":
            return reverse if beta == 1 else forward
        case "skew-kl":
            mixed = alpha * q_tail + (1 - alpha) * p_tail
            return 2 * (1 - alpha) * q_tail * p_tail / mixed if mixed else 0.0
        case _:
            return q_tail * (1 - alpha) / (2 * alpha)


def _log_ratio(weight: float, one: float, other: float) -> float:
    return weight * math.log(one / other) if weight > 0 else 0.0


def _jsd(p: float, q: float, given: Parameters) -> float:
    beta = given["beta"]
    if beta in (0, 1):
        return _log_ratio(q, q, p) if beta == 0 else _log_ratio(p, p, max(q, LEAST))
    m = beta * q + (1 - beta) * p
    return beta * _log_ratio(q, q, m) + (1 - beta) * _log_ratio(p, p, m)


def _jsd_pull(p: float, q: float, given: Parameters) -> float:
    beta = given["beta"]
    if beta in (0, 1):
        return -q if beta == 0 else _log_ratio(p, p, max(q, LEAST))
    return (1 - beta) * _log_ratio(p, p, beta * q + (1 - beta) * p)


def _skewed(one: float, other: float, given: Parameters) -> float:
    return given["alpha"] * one + (1 - given["alpha"]) * other


def _skew_pull(p: float, q: float, given: Parameters) -> float:
    return -(1 - given["alpha"]) * q * (p / _skewed(q, p, given)) if p * q > 0 else 0.0


def _skew_reverse_pull(p: float, q: float, given: Parameters) -> float:
    if p == 0:
        return 0.0
    m = _skewed(p, q, given)
    return p * (math.log(p / m) + 1 - given["alpha"] * p / m)


_Part = Callable[[float, float, Parameters], float]
_VALUES: dict[str, _Part] = {
    "reverse-kl": lambda p, q, _: _log_ratio(p, p, max(q, LEAST)),
    "mixed-kl": lambda p, q, given: (
        (1 - given["lam"]) * _log_ratio(q, q, p) + given["lam"] * _log_ratio(p, p, max(q, LEAST))
    ),
    "jsd": _jsd,
    "skew-kl": lambda p, q, given: _log_ratio(q, q, _skewed(q, p, given)),
    "skew-reverse-kl": lambda p, q, given: _log_ratio(p, p, _skewed(p, q, given)),
}
_PULLS: dict[str, _Part] = {
    "reverse-kl": _VALUES["reverse-kl"],
    "mixed-kl": lambda p, q, given: (
        -(1 - given["lam"]) * q + given["lam"] * _log_ratio(p, p, max(q, LEAST))
    ),
    "jsd": _jsd_pull,
    "skew-kl": _skew_pull,
    "skew-reverse-kl": _skew_reverse_pull,
}
