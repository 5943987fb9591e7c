"""The table of methods a second time: every row of it in plain float64, from the papers.

What a folder holds of each method and form, which models it reads, its parameters, and its trust,
residual and scale at one position. Every suite that runs over the methods compares with these.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Parameters = dict[str, Any]

LIVE, TARGET, WEIGHT = "live", "frozen-target", "frozen-weight"
NOTHING: tuple[str, ...] = ()
STUDENT, BASE, TEACHER = ("student",), ("base",), ("teacher",)


class Facts(NamedTuple):
    """What is known of a method in one form."""

    stored: str  # the distribution that a target folder holds
    # t: needs a teacher's scores, m: needs a mask of the demonstrations, s: reads the student as it
    # trains, w: the loss is a weighted likelihood, whose Q is one-hot
    letters: str
    reads: tuple[str, ...]  # the models that the target depends on


FACTS: dict[tuple[str, str], Facts] = {
    ("sft", TARGET): Facts("observed", "", NOTHING),
    ("sft", WEIGHT): Facts("observed", "w", NOTHING),
    ("sft", LIVE): Facts("observed", "", NOTHING),
    ("dft", TARGET): Facts("base", "", BASE),
    ("dft", WEIGHT): Facts("observed", "w", BASE),
    ("dft", LIVE): Facts("observed", "sw", STUDENT),
    ("beyond-log", TARGET): Facts("base", "", BASE),
    ("beyond-log", WEIGHT): Facts("observed", "w", BASE),
    ("beyond-log", LIVE): Facts("observed", "sw", STUDENT),
    ("profit", TARGET): Facts("base", "", BASE),
    ("profit", WEIGHT): Facts("observed", "w", BASE),
    ("profit", LIVE): Facts("observed", "sw", STUDENT),
    ("eaft", TARGET): Facts("base", "", BASE),
    ("eaft", WEIGHT): Facts("observed", "w", BASE),
    ("eaft", LIVE): Facts("observed", "sw", STUDENT),
    ("iw-sft", LIVE): Facts("base-observed", "s", STUDENT + BASE),
    ("cft", WEIGHT): Facts("observed", "mw", NOTHING),
    ("cft", TARGET): Facts("base", "m", BASE),
    ("cft", LIVE): Facts("observed", "mw", STUDENT),
    ("label-smoothing", TARGET): Facts("uniform", "", NOTHING),
    ("label-smoothing", LIVE): Facts("uniform", "", NOTHING),
    ("sft+kl", TARGET): Facts("base", "", BASE),
    ("sft+kl", LIVE): Facts("base", "", BASE),
    ("asft", TARGET): Facts("base", "", BASE),
    ("asft", LIVE): Facts("base", "s", STUDENT + BASE),
    ("psft", LIVE): Facts("base-observed", "s", STUDENT + BASE),
    ("gem", LIVE): Facts("observed", "s", STUDENT),
    ("kd", TARGET): Facts("teacher", "t", TEACHER),
    ("kd", LIVE): Facts("teacher", "t", TEACHER),
    ("kd-hybrid", TARGET): Facts("teacher", "t", TEACHER),
    ("kd-hybrid", LIVE): Facts("teacher", "t", TEACHER),
    ("target-sft", TARGET): Facts("mixture", "t", BASE + TEACHER),
    ("target-sft", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("reverse-kl", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("mixed-kl", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("jsd", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("skew-kl", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("skew-reverse-kl", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
    ("gift", TARGET): Facts("base", "", BASE),
    ("gift", LIVE): Facts("base", "", BASE),
    ("flow", WEIGHT): Facts("observed", "w", BASE),
    ("flow", TARGET): Facts("base", "", BASE),
    ("flow", LIVE): Facts("observed", "w", STUDENT + BASE),
    ("stm", WEIGHT): Facts("observed", "w", BASE),
    ("stm", TARGET): Facts("base", "", BASE),
    ("stm", LIVE): Facts("observed", "w", STUDENT + BASE),
    ("token-cleaning", WEIGHT): Facts("observed", "tw", BASE + TEACHER),
    ("token-cleaning", TARGET): Facts("base", "t", BASE + TEACHER),
    ("token-cleaning", LIVE): Facts("observed", "tw", STUDENT + BASE + TEACHER),
    ("contrast", TARGET): Facts("contrast", "t", BASE + TEACHER),
    ("contrast", LIVE): Facts("contrast", "t", BASE + TEACHER),
    ("idft", LIVE): Facts("observed", "sw", STUDENT),
    ("trsft", LIVE): Facts("observed", "sw", STUDENT),
    ("prift-prob", WEIGHT): Facts("observed", "w", BASE),
    ("prift-prob", TARGET): Facts("base", "", BASE),
    ("prift-prob", LIVE): Facts("observed", "w", STUDENT + BASE),
    ("prift-mass", WEIGHT): Facts("observed", "w", BASE),
    ("prift-mass", TARGET): Facts("base", "", BASE),
    ("prift-mass", LIVE): Facts("observed", "w", STUDENT + BASE),
    ("infosft", WEIGHT): Facts("observed", "w", BASE),
    ("infosft", LIVE): Facts("observed", "s", STUDENT),
    ("deft", TARGET): Facts("base", "", BASE),
    ("deft", WEIGHT): Facts("observed", "w", BASE),
    ("deft", LIVE): Facts("observed", "sw", STUDENT),
    ("talr", TARGET): Facts("base", "", BASE),
    ("talr", WEIGHT): Facts("observed", "w", BASE),
    ("talr", LIVE): Facts("observed", "sw", STUDENT + BASE),
    ("ranktuner", WEIGHT): Facts("observed", "w", BASE),
    ("ranktuner", LIVE): Facts("observed", "s", STUDENT),
    ("se-kd", TARGET): Facts("teacher", "t", BASE + TEACHER),
    ("se-kd", LIVE): Facts("teacher", "t", BASE + TEACHER),
    ("tip", TARGET): Facts("teacher", "t", BASE + TEACHER),
    ("tip", LIVE): Facts("teacher", "t", BASE + TEACHER),
    ("amid", TARGET): Facts("mixture", "t", BASE + TEACHER),
    ("amid", LIVE): Facts("teacher", "ts", STUDENT + TEACHER),
}
NAMES = list(dict.fromkeys(name for name, _ in FACTS))
FORMS = {name: [form for each, form in FACTS if each == name] for name in NAMES}
READS_STUDENT = [name for name, form in FACTS if form == LIVE and "s" in FACTS[name, form].letters]
LIVE_ONLY = [name for name in NAMES if FORMS[name] == [LIVE]]
# their loss is no cross-entropy: `divergences` states them
DIVERGENCES = ("reverse-kl", "mixed-kl", "jsd", "skew-kl", "skew-reverse-kl")
WITH_TEACHER = [name for name in NAMES if "t" in FACTS[name, FORMS[name][0]].letters]

DEFAULTS: dict[str, Parameters] = {
    "sft": {},
    "dft": {},
    "beyond-log": {"alpha": 8},
    "profit": {"tau": 0.1},
    "eaft": {"a": 1},
    "iw-sft": {"T": 1},
    "cft": {},
    "label-smoothing": {"lam": 0.1},
    "sft+kl": {"lam": 0.1},
    "asft": {"lam": 0.1},
    "psft": {"eps_hi": 0.28},
    "gem": {"beta": 0.7, "h": "linear"},
    "kd": {},
    "kd-hybrid": {"lam": 0.5},
    "target-sft": {"eta": 0.5},
    "reverse-kl": {},
    "mixed-kl": {"lam": 0.5},
    "jsd": {"beta": 0.5},
    "skew-kl": {"alpha": 0.1},
    "skew-reverse-kl": {"alpha": 0.1},
    "gift": {"beta": 20},
    "flow": {},
    "stm": {"tau": 0.4},
    "token-cleaning": {"keep": 0.6},
    "contrast": {"alpha": 0.2, "beta": 0.4},
    "idft": {"beta": 1},
    "trsft": {"tau": 0.1},
    "prift-prob": {},
    "prift-mass": {"tau": 0.5},
    "infosft": {"P": 0.93},
    "deft": {},
    "talr": {"floor": 0.01},
    "ranktuner": {"power": 0},
    "se-kd": {"keep": 0.2},
    "tip": {"keep": 0.2},
    "amid": {"eta": 0.5, "alpha": 0},
}
# what is given besides nothing at all
VARIANTS: dict[str, list[Parameters]] = {
    "beyond-log": [{"alpha": 1}, {"alpha": 10}, {"alpha": 0.3}],
    "profit": [{"tau": 0.5}, {"tau": 1}],
    "eaft": [{"a": 0}, {"a": 0.5}, {"a": 2}],
    "iw-sft": [{"T": 0}, {"T": 0.3}, {"T": 2}],
    "label-smoothing": [{"lam": 0}, {"lam": 0.3}, {"lam": 1}],
    "sft+kl": [{"lam": 0}, {"lam": 1.5}],
    "asft": [{"lam": 0}, {"lam": 0.05}, {"lam": 2}],
    "psft": [{"eps_hi": 0}, {"eps_hi": 0.2}, {"eps_hi": 3}],
    "gem": [{"h": "logsigmoid"}, {"beta": 1.5}, {"beta": 0.3, "h": "logsigmoid"}],
    "kd-hybrid": [{"lam": 0}, {"lam": 0.1}, {"lam": 1}],
    "target-sft": [{"eta": 0}, {"eta": 0.3}, {"eta": 1}],
    "mixed-kl": [{"lam": 0}, {"lam": 0.2}, {"lam": 1}],
    "jsd": [{"beta": 0}, {"beta": 0.1}, {"beta": 0.9}, {"beta": 1}],
    "skew-kl": [{"alpha": 0.001}, {"alpha": 0.7}],
    "skew-reverse-kl": [{"alpha": 0.001}, {"alpha": 0.7}],
    "gift": [{"beta": 0}, {"beta": 0.5}, {"beta": 5}, {"beta": 500}],
    "flow": [{"tau": 0.2}, {"tau": 1}, {"tau": 4}],
    "stm": [{"tau": 0.1}, {"tau": 0.9}],
    "token-cleaning": [
        {"keep": 0},
        {"keep": 0.25},
        {"keep": 1},
        {"threshold": 0.3},
        {"threshold": -1, "keep": 0.1},
    ],
    "contrast": [{"alpha": 0.5, "beta": 0.1}, {"alpha": 1e-6, "beta": 0}, {"alpha": 1}],
    "idft": [{"beta": 0.5}, {"beta": 4}],
    "trsft": [{"tau": 0.5}, {"tau": 1}],
    "prift-mass": [{"tau": 0.1}, {"tau": 0.9}, {"tau": 1}],
    "infosft": [{"P": 0.6}, {"P": 0.999}],
    "talr": [{"tau": 0.5}, {"tau": 3, "floor": 0}, {"tau": 2, "floor": 0.5}],
    "ranktuner": [{"power": 1}, {"power": 0.3}],
    "se-kd": [{"keep": 0}, {"keep": 0.7}, {"keep": 1}, {"threshold": 1}],
    "tip": [{"keep": 0}, {"keep": 0.7}, {"keep": 1}, {"threshold": 2}],
    "amid": [
        {"eta": 0},
        {"eta": 1},
        {"alpha": 1},
        {"alpha": -1, "eta": 0.2},
        {"alpha": 0.9},
        {"alpha": 4, "eta": 0.7},
    ],
}


@dataclass(frozen=True)
class Token:
    """One position, with what the formulas read of its example and of the data set."""

    followed: list[float]  # log-probabilities: the student's if live, else the base's
    base: list[float]
    teacher: list[float]
    observed: int
    mask: float
    log_ratio: float = 0.0  # mean of log p_y − log b_y over the example
    losses: Sequence[float] = ()  # −log b_y of the data set
    excesses: Sequence[float] = ()  # log q_y − log b_y of the data set
    entropies: Sequence[float] = ()  # of the base, of the data set
    importances: Sequence[float] = ()  # these plus KL(q, b)


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


def to_followed(trust: Callable[[Token, Parameters], float]) -> Formula:
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
    tau = given["tau"] if "tau" in given else statistics.median(token.losses)
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


def base_entropy(token: Token) -> float:
    return entropy(probabilities(token.base))


def importance(token: Token) -> float:
    pairs = zip(token.teacher, token.base, strict=True)
    kl = sum(math.exp(q) * (q - b) for q, b in pairs if q > -math.inf)
    return min(base_entropy(token) + kl, 1e6)


def prift_mass_trust(token: Token, given: Parameters) -> float:
    less = [math.exp(b) for b in token.base if b < token.base[token.observed]]
    return float(math.fsum([b_y(token), *less]) >= given["tau"])


def infosft(token: Token, given: Parameters) -> Row:
    p, at_end = p_y(token), given["P"]
    if p in (0, 1):
        return 1.0, one_hot(token), 0.0
    rest = math.fsum(q for k, q in enumerate(probabilities(token.followed)) if k != token.observed)
    excess = (math.log(p) - math.log(rest)) / math.log(at_end / (1 - at_end))
    return 1.0, one_hot(token), p * max(1 - excess, 0)


def deft_trust(token: Token, _: Parameters) -> float:
    return p_y(token) ** math.fsum(p * p for p in probabilities(token.followed))


def talr_trust(token: Token, given: Parameters) -> float:
    tau = given["tau"] if "tau" in given else statistics.median(token.losses)
    return max(p_y(token) ** (1 / tau), given["floor"])


def ranktuner(token: Token, given: Parameters) -> Row:
    rank = sum(log_prob >= log_p_y(token) for log_prob in token.followed)
    ranked = enumerate(sorted(probabilities(token.followed), reverse=True), start=1)
    expected = math.fsum(place * p for place, p in ranked)
    indicator = 2 ** (1 / math.log2(1 + rank) - 1 / math.log2(1 + expected))
    return 1.0, one_hot(token), p_y(token) ** given["power"] / indicator


def selected(value: float, of_all: Sequence[float], given: Parameters) -> float:
    """Whether a value is among the highest, or at least the threshold that is given."""
    if "threshold" in given:
        return float(value >= given["threshold"])
    kept = sorted(of_all, reverse=True)[: math.ceil(len(of_all) * given["keep"])]
    return float(bool(kept) and value >= kept[-1])


def amid(token: Token, given: Parameters) -> Row:
    def mean(log_p: float, log_q: float) -> float:
        eta, power = given["eta"], (1 - given["alpha"]) / 2
        p, q = math.exp(log_p), math.exp(log_q)
        if eta in (0, 1):
            return q if eta else p
        if power == 0:
            return p ** (1 - eta) * q**eta
        if power < 0 and 0 in (p, q):
            return 0.0
        return float(((1 - eta) * p**power + eta * q**power) ** (1 / power))

    pairs = zip(token.followed, token.teacher, strict=True)
    return 0.0, normalised([mean(*pair) for pair in pairs]), 1.0


def idft_trust(token: Token, given: Parameters) -> float:
    surprise = -(log_p_y(token) + entropy(probabilities(token.followed))) / given["beta"]
    power = 2.0 if surprise > 100 else min(max(math.exp(surprise), 0.1), 2.0)
    return p_y(token) ** power


FORMULAS: dict[str, Formula] = {
    "sft": lambda token, _: (1.0, one_hot(token), 1.0),
    "dft": to_followed(lambda token, _: p_y(token)),
    "beyond-log": to_followed(lambda token, given: p_y(token) ** given["alpha"]),
    "profit": to_followed(lambda token, given: float(p_y(token) >= given["tau"])),
    "eaft": to_followed(eaft_trust),
    "iw-sft": iw_sft,
    "cft": to_followed(lambda token, _: token.mask),
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
    # where they are 0, at which training ends
    **dict.fromkeys(DIVERGENCES, lambda token, _: (0.0, probabilities(token.teacher), 1.0)),
    "gift": gift,
    "flow": to_followed(flow_trust),
    "stm": to_followed(lambda token, given: float(b_y(token) >= given["tau"])),
    "token-cleaning": to_followed(token_cleaning_trust),
    "contrast": contrast,
    "idft": to_followed(idft_trust),
    "trsft": to_followed(lambda token, given: min(1.0, p_y(token) / given["tau"])),
    "prift-prob": to_followed(lambda token, _: b_y(token)),
    "prift-mass": to_followed(prift_mass_trust),
    "infosft": infosft,
    "deft": to_followed(deft_trust),
    "talr": to_followed(talr_trust),
    "ranktuner": ranktuner,
    "se-kd": lambda token, given: (
        0.0,
        probabilities(token.teacher),
        selected(base_entropy(token), token.entropies, given),
    ),
    "tip": lambda token, given: (
        0.0,
        probabilities(token.teacher),
        selected(importance(token), token.importances, given),
    ),
    "amid": amid,
}
