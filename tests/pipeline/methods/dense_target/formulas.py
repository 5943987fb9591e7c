"""Dense targets as methods.md has them, position by position in plain float64: γ, π̃ and s."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .cases import DEFAULTS, Case, Parameters


@dataclass(frozen=True)
class Token:
    """One position, what its example says (`log_ratio`), and what the data set does."""

    followed: list[float]  # log-probabilities: the student's if live, else the base's
    base: list[float]
    teacher: list[float]
    observed: int
    mask: float
    log_ratio: float  # mean of log p_y − log b_y over the example
    losses: list[float]  # −log b_y of the data set
    excesses: list[float]  # log q_y − log b_y of the data set


Row = tuple[float, list[float], float]  # γ, π̃, s
Formula = Callable[[Token, Parameters], Row]


def probabilities(log_probs: list[float]) -> list[float]:
    return [math.exp(log_prob) for log_prob in log_probs]


def entropy(probs: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def normalised(weights: list[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def log_p_y(token: Token) -> float:
    return token.followed[token.observed]


def p_y(token: Token) -> float:
    return math.exp(log_p_y(token))


def b_y(token: Token) -> float:
    return math.exp(token.base[token.observed])


def one_hot(token: Token) -> list[float]:
    return [float(k == token.observed) for k in range(len(token.followed))]


def to_student(trust: Callable[[Token, Parameters], float]) -> Formula:
    """A row whose π̃ is the followed model and whose scale is 1."""
    return lambda token, given: (trust(token, given), probabilities(token.followed), 1.0)


def eaft_trust(token: Token, given: Parameters) -> float:
    top = sorted(probabilities(token.followed), reverse=True)[:20]
    return (entropy(normalised(top)) / 3.0) ** given["a"]


def iw_sft(token: Token, given: Parameters) -> Row:
    log_weight = given["T"] * token.log_ratio
    return 1.0, one_hot(token), 16.0 if log_weight > 100 else min(math.exp(log_weight), 16.0)


def asft(token: Token, given: Parameters) -> Row:
    scale = p_y(token) + given["lam"]
    return p_y(token) / scale, probabilities(token.base), scale


def psft(token: Token, given: Parameters) -> Row:
    log_ratio = log_p_y(token) - token.base[token.observed]
    ratio = math.inf if log_ratio > 700 else math.exp(log_ratio)
    return 1.0, one_hot(token), ratio if ratio <= 1 + given["eps_hi"] else 0.0


def target_sft(token: Token, given: Parameters) -> Row:
    def power(log_prob: float, exponent: float) -> float:
        return 1.0 if exponent == 0 else math.exp(exponent * log_prob)

    eta = given["eta"]
    pairs = zip(token.followed, token.teacher, strict=True)
    return p_y(token), normalised([power(p, 1 - eta) * power(q, eta) for p, q in pairs]), 1.0


def gift(token: Token, given: Parameters) -> Row:
    odds = max(b_y(token), 1e-10) * math.expm1(given["beta"])
    return odds / (1 + odds), probabilities(token.base), 1.0


def flow_trust(token: Token, given: Parameters) -> float:
    tau = given.get("tau", statistics.median(token.losses))
    return b_y(token) ** (1 / tau)


def token_cleaning_trust(token: Token, given: Parameters) -> float:
    excess = token.teacher[token.observed] - token.base[token.observed]
    if "threshold" in given:
        return float(excess >= given["threshold"])
    kept = sorted(token.excesses, reverse=True)[: int(len(token.excesses) * given["keep"])]
    return float(bool(kept) and excess >= kept[-1])


def contrast(token: Token, given: Parameters) -> Row:
    q, b = probabilities(token.teacher), probabilities(token.base)
    head = [q_k >= given["alpha"] * max(q) for q_k in q]
    residual = normalised([q[k] / b[k] if head[k] else 0.0 for k in range(len(q))])
    pairs = zip(token.teacher, token.base, strict=True)
    divergence = sum(math.exp(q) * (q - b) for q, b in pairs if q > -math.inf)
    return 0.0, residual, float(divergence >= given["beta"])


def idft_trust(token: Token, given: Parameters) -> float:
    surprise = -(log_p_y(token) + entropy(probabilities(token.followed))) / given["beta"]
    power = 2.0 if surprise > 100 else min(max(math.exp(surprise), 0.1), 2.0)
    return p_y(token) ** power


FORMULAS: dict[str, Formula] = {
    "sft": lambda token, _: (1.0, one_hot(token), 1.0),
    "dft": to_student(lambda token, _: p_y(token)),
    "beyond-log": to_student(lambda token, given: p_y(token) ** given["alpha"]),
    "profit": to_student(lambda token, given: float(p_y(token) >= given["tau"])),
    "eaft": to_student(eaft_trust),
    "iw-sft": iw_sft,
    "cft": to_student(lambda token, _: token.mask),
    "label-smoothing": lambda token, given: (
        1 - given["lam"],
        [1 / len(token.followed)] * len(token.followed),
        1.0,
    ),
    "sft+kl": lambda token, given: (
        1 / (1 + given["lam"]),
        probabilities(token.base),
        1 + given["lam"],
    ),
    "asft": asft,
    "psft": psft,
    "kd": lambda token, _: (0.0, probabilities(token.teacher), 1.0),
    "kd-hybrid": lambda token, given: (1 - given["lam"], probabilities(token.teacher), 1.0),
    "target-sft": target_sft,
    "gift": gift,
    "flow": to_student(flow_trust),
    "stm": to_student(lambda token, given: float(b_y(token) >= given["tau"])),
    "token-cleaning": to_student(token_cleaning_trust),
    "contrast": contrast,
    "idft": to_student(idft_trust),
    "trsft": to_student(lambda token, given: min(1.0, p_y(token) / given["tau"])),
}


def gem_gradient(token: Token, given: Parameters) -> list[float]:
    """a − (Σa)·δ, a = softmax(z/β), times σ(0.01·(z − z_y)) in the second variant."""
    highest = max(token.followed)
    pull = normalised([math.exp((z - highest) / given["beta"]) for z in token.followed])
    if given["h"] == "logsigmoid":
        # softmax(z/β) is 0 where z is −∞, and so is its product with a sigmoid in [0, 1]
        above = [z - log_p_y(token) if z > -math.inf else 0.0 for z in token.followed]
        pull = [a / (1 + math.exp(-0.01 * z)) for a, z in zip(pull, above, strict=True)]
    total = math.fsum(pull)
    return [a - total * is_y for a, is_y in zip(pull, one_hot(token), strict=True)]


def expected_at(token: Token, name: str, form: str, given: Parameters) -> tuple[list[float], float]:
    """The target over the vocabulary and the scale at one position."""
    if name == "gem":
        gradient = gem_gradient(token, given)
        return [math.exp(z) - g for z, g in zip(token.followed, gradient, strict=True)], 1.0
    trust, residual, scale = FORMULAS[name](token, given)
    if form == "frozen-weight":
        return one_hot(token), scale * trust
    target = [
        trust * is_y + (1 - trust) * rest
        for is_y, rest in zip(one_hot(token), residual, strict=True)
    ]
    return target, scale


def tokens_of(case: Case, form: str) -> list[list[Token]]:
    """Every position of every example, with what the example and the data set say of it."""
    followed = case.student if form == "live" else case.base
    observed = case.observed.tolist()
    places = [(i, t) for i, row in enumerate(observed) for t in range(len(row))]

    def at_observed(model: np.ndarray) -> dict[tuple[int, int], float]:
        return {(i, t): float(model[i, t, observed[i][t]]) for i, t in places}

    own, base, teacher = map(at_observed, (followed, case.base, case.teacher))
    losses = [-base[place] for place in places]
    excesses = [teacher[place] - base[place] for place in places]
    return [
        [
            Token(
                followed=followed[i, t].tolist(),
                base=case.base[i, t].tolist(),
                teacher=case.teacher[i, t].tolist(),
                observed=y,
                mask=float(case.mask[i, t]),
                log_ratio=sum(own[i, u] - base[i, u] for u in range(len(row))) / len(row),
                losses=losses,
                excesses=excesses,
            )
            for t, y in enumerate(row)
        ]
        for i, row in enumerate(observed)
    ]


def expected(case: Case, name: str, form: str, given: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """The target [B, T, V] and the scale [B, T]."""
    settled = DEFAULTS[name] | given
    rows = [
        [expected_at(token, name, form, settled) for token in example]
        for example in tokens_of(case, form)
    ]
    return (
        np.array([[target for target, _ in row] for row in rows]),
        np.array([[scale for _, scale in row] for row in rows]),
    )
