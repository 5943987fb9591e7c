"""Dense targets against methods.md, written out here position by position in plain float64."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods import choices, dense_target
from torch.nn import functional

Parameters = dict[str, Any]
LIBRARIES = ("numpy", "torch")

# Which models each form of each method reads. Where it is none, any model tells the shape.
STUDENT, BASE, TEACHER = ("student",), ("base",), ("teacher",)
NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("sft", "live"): (),
    ("sft", "frozen-target"): (),
    ("sft", "frozen-weight"): (),
    ("dft", "live"): STUDENT,
    ("dft", "frozen-target"): BASE,
    ("dft", "frozen-weight"): BASE,
    ("beyond-log", "live"): STUDENT,
    ("beyond-log", "frozen-target"): BASE,
    ("beyond-log", "frozen-weight"): BASE,
    ("profit", "live"): STUDENT,
    ("profit", "frozen-target"): BASE,
    ("profit", "frozen-weight"): BASE,
    ("eaft", "live"): STUDENT,
    ("eaft", "frozen-target"): BASE,
    ("eaft", "frozen-weight"): BASE,
    ("iw-sft", "live"): STUDENT + BASE,
    ("cft", "live"): STUDENT,
    ("cft", "frozen-target"): BASE,
    ("cft", "frozen-weight"): (),
    ("label-smoothing", "live"): (),
    ("label-smoothing", "frozen-target"): (),
    ("sft+kl", "live"): BASE,
    ("sft+kl", "frozen-target"): BASE,
    ("asft", "live"): STUDENT + BASE,
    ("asft", "frozen-target"): BASE,
    ("psft", "live"): STUDENT + BASE,
    ("gem", "live"): STUDENT,
    ("kd", "live"): TEACHER,
    ("kd", "frozen-target"): TEACHER,
    ("kd-hybrid", "live"): TEACHER,
    ("kd-hybrid", "frozen-target"): TEACHER,
    ("target-sft", "live"): STUDENT + TEACHER,
    ("target-sft", "frozen-target"): BASE + TEACHER,
    ("gift", "live"): BASE,
    ("gift", "frozen-target"): BASE,
    ("flow", "live"): STUDENT + BASE,
    ("flow", "frozen-target"): BASE,
    ("flow", "frozen-weight"): BASE,
    ("stm", "live"): STUDENT + BASE,
    ("stm", "frozen-target"): BASE,
    ("stm", "frozen-weight"): BASE,
    ("token-cleaning", "live"): STUDENT + BASE + TEACHER,
    ("token-cleaning", "frozen-target"): BASE + TEACHER,
    ("token-cleaning", "frozen-weight"): BASE + TEACHER,
    ("contrast", "live"): BASE + TEACHER,
    ("contrast", "frozen-target"): BASE + TEACHER,
    ("idft", "live"): STUDENT,
    ("trsft", "live"): STUDENT,
}
PAIRS = sorted(NEEDS)
FORMS = {name: [form for each, form in PAIRS if each == name] for name, _ in PAIRS}

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
    "gift": {"beta": 20},
    "flow": {},
    "stm": {"tau": 0.4},
    "token-cleaning": {"keep": 0.6},
    "contrast": {"alpha": 0.2, "beta": 0.4},
    "idft": {"beta": 1},
    "trsft": {"tau": 0.1},
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
}


@dataclass(frozen=True)
class Case:
    """What three models say [B, T, V] of observed tokens [B, T], all of them one data set."""

    student: Any
    base: Any
    teacher: Any
    observed: Any
    mask: Any

    def in_library(self, library: str) -> "Case":
        if library == "numpy":
            return self
        return Case(*map(torch.from_numpy, vars(self).values()))

    def target(
        self, name: str, form: str, given: Parameters, models: tuple[str, ...] | None = None
    ) -> tuple[Any, Any]:
        """What the code under test says, shown only the models that the method reads."""
        models = models or NEEDS[name, form] or ("student" if form == "live" else "base",)
        known = {f"{model}_log_probs": getattr(self, model) for model in models}
        mask = self.mask if name == "cft" else None
        return dense_target(name, form=form, observed=self.observed, mask=mask, **known, **given)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1)[..., None]


def make_case(
    seed: int, batch: int, length: int, vocab: int, spread: float, nearness: float = 0.5
) -> Case:
    rng = np.random.default_rng(seed)
    shape = (batch, length, vocab)
    base = spread * rng.standard_normal(shape)
    student = log_softmax(base + nearness * spread * rng.standard_normal(shape))
    teacher = log_softmax(base + spread * rng.standard_normal(shape))
    # every other token is a likely one
    likely = np.argmax(student + rng.gumbel(size=shape), axis=-1)
    anything = rng.integers(0, vocab, (batch, length))
    observed = np.where(rng.random((batch, length)) < 0.5, likely, anything)
    mask = rng.random((batch, length)).round(1)
    return Case(student, log_softmax(base), teacher, observed, mask)


CASES = [
    make_case(0, 1, 1, 2, 0.5),
    make_case(1, 2, 3, 3, 1.0),
    make_case(2, 1, 9, 20, 2.0),
    make_case(3, 3, 5, 21, 4.0),
    make_case(4, 2, 9, 60, 8.0),
    make_case(5, 3, 7, 60, 0.5, nearness=0.1),
    make_case(6, 1, 8, 7, 2.0, nearness=0.1),
    make_case(7, 2, 8, 33, 1.0),
]


# The reference: γ, π̃ and s at one position.


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


def test_every_method_in_every_form_is_in_these_tests() -> None:
    tested = {(choice.method.name, choice.form) for choice in choices()}

    assert set(NEEDS) == tested
    assert len(tested) == 48
    assert set(FORMULAS) | {"gem"} == set(DEFAULTS) == set(LOSSES) == {name for name, _ in tested}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_the_target_and_the_scale_are_those_of_the_formula(
    name: str, form: str, library: str
) -> None:
    for case in CASES:
        for given_parameters in [{}, *VARIANTS.get(name, [])]:
            target, scale = case.in_library(library).target(name, form, given_parameters)
            wanted_target, wanted_scale = expected(case, name, form, given_parameters)

            assert type(target) is type(scale) is type(case.in_library(library).student)
            assert target.dtype == scale.dtype == case.in_library(library).student.dtype
            assert scale.shape == case.observed.shape
            np.testing.assert_allclose(
                target, wanted_target, 1e-10, 1e-14, err_msg=f"{given_parameters}"
            )
            np.testing.assert_allclose(
                scale, wanted_scale, 1e-10, 1e-14, err_msg=f"{given_parameters}"
            )


def test_the_cases_reach_both_sides_of_every_switch() -> None:
    """Else the test above would not tell one side from the other."""

    def seen(name: str, place: int) -> list[float]:
        return [
            FORMULAS[name](token, DEFAULTS[name])[place]
            for case in CASES
            for example in tokens_of(case, "live")
            for token in example
        ]

    for name in ("profit", "stm", "token-cleaning"):
        assert {0.0, 1.0} == set(seen(name, 0)), name
    assert set(seen("contrast", 2)) == {0.0, 1.0}
    assert min(seen("psft", 2)) == 0.0 < 1.0 < max(seen("psft", 2))
    assert max(seen("trsft", 0)) == 1.0 > min(seen("trsft", 0))
    clamped = [iw_sft(replace(t, log_ratio=3.0), DEFAULTS["iw-sft"])[2] for t in any_tokens(1)]
    assert clamped == [16.0]
    powers = [
        idft_trust(token, {"beta": 1})
        for case in CASES
        for row in tokens_of(case, "live")
        for token in row
    ]
    squares = [
        p_y(token) ** 2 for case in CASES for row in tokens_of(case, "live") for token in row
    ]
    assert 0 < sum(map(math.isclose, powers, squares)) < len(powers)


def any_tokens(count: int) -> list[Token]:
    return [token for row in tokens_of(CASES[2], "live") for token in row][:count]


def sequence(base_y: list[float], ratios: list[float]) -> Case:
    """One example over three tokens; the student gives y the base's share times a ratio."""

    def model(shares: np.ndarray) -> np.ndarray:
        return np.log(np.stack([shares, (1 - shares) * 0.25, (1 - shares) * 0.75], -1))[None]

    base = np.array(base_y)
    student = model(base * np.array(ratios))
    observed = np.zeros((1, len(base_y)), np.int64)
    return Case(student, model(base), model(base), observed, np.ones((1, len(base_y))))


@pytest.mark.parametrize(
    ("ratios", "given_parameters", "weight"),
    [
        ([2.0, 8.0], {}, 4.0),
        ([2.0, 8.0], {"T": 0.5}, 2.0),
        ([2.0, 8.0], {"T": 2}, 16.0),
        ([4.0, 8.0], {"T": 2}, 16.0),  # e^(T·mean) = 32
        ([0.25, 0.25], {"T": 2}, 1 / 16),
        ([1.0, 1.0], {}, 1.0),
    ],
)
def test_iw_sft_weighs_an_example_by_its_mean_log_ratio_and_by_16_at_most(
    ratios: list[float], given_parameters: Parameters, weight: float
) -> None:
    case = sequence([0.1, 0.01], ratios)
    target, scale = case.target("iw-sft", "live", given_parameters)

    np.testing.assert_allclose(scale, [[weight, weight]], rtol=1e-12)
    assert target[0].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_iw_sft_takes_its_mean_over_each_example_alone() -> None:
    first, second = sequence([0.1, 0.1], [2.0, 2.0]), sequence([0.1, 0.1], [3.0, 3.0])
    both = Case(
        *(
            np.concatenate(pair)
            for pair in zip(vars(first).values(), vars(second).values(), strict=True)
        )
    )
    _, scale = both.target("iw-sft", "live", {})

    np.testing.assert_allclose(scale, [[2, 2], [3, 3]], rtol=1e-12)


def test_psft_keeps_a_ratio_up_to_its_limit_and_none_above() -> None:
    ratios = [0.01, 0.5, 1.0, 1.27999, 1.28001, 5.0]
    case = sequence([0.1] * 6, ratios)
    _, scale = case.target("psft", "live", {})
    _, tighter = case.target("psft", "live", {"eps_hi": 0.2})

    np.testing.assert_allclose(scale, [[0.01, 0.5, 1.0, 1.27999, 0, 0]], rtol=1e-12)
    np.testing.assert_allclose(tighter, [[0.01, 0.5, 1.0, 0, 0, 0]], rtol=1e-12)


def test_eaft_reads_the_twenty_most_probable_tokens_alone() -> None:
    """A flat head of 20 tokens has an entropy of log 20, whatever is below it."""
    probs = np.array([0.04] * 20 + [0.2 / 40] * 40)
    log_probs = np.log(np.random.default_rng(0).permutation(probs))[None]
    observed = np.array([int(np.argmax(log_probs))])
    target, _ = dense_target("eaft", student_log_probs=log_probs, observed=observed)

    trust = math.log(20) / 3
    assert target[0, observed[0]] == pytest.approx(trust + (1 - trust) * 0.04, rel=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_positions_may_come_without_a_batch(name: str, form: str, library: str) -> None:
    case = CASES[2].in_library(library)
    alone = Case(*(value[0] for value in vars(case).values()))
    target, scale = case.target(name, form, {})
    target_alone, scale_alone = alone.target(name, form, {})

    np.testing.assert_array_equal(target_alone, target[0])
    np.testing.assert_array_equal(scale_alone, scale[0])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_float32_stays_float32(name: str, form: str, library: str) -> None:
    case = CASES[5]
    single = Case(
        *(
            value.astype(np.float32) if value.dtype == float else value
            for value in vars(case).values()
        )
    )
    wide = Case(
        *(
            value.astype(float) if value.dtype == np.float32 else value
            for value in vars(single).values()
        )
    )
    target, scale = single.in_library(library).target(name, form, {})
    wanted_target, wanted_scale = expected(wide, name, form, {})

    assert target.dtype == scale.dtype == single.in_library(library).student.dtype
    np.testing.assert_allclose(target, wanted_target, 2e-4, 1e-6)
    np.testing.assert_allclose(scale, wanted_scale, 2e-4, 1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "beta",
    [80.0, 89.0, 150.0, 500.0],
)
def test_gift_in_float32_takes_every_beta_that_it_allows(beta: float, library: str) -> None:
    """e^β is more than float32 holds from β = 88.8 on; the trust is 1 there for any b_y."""
    base = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    with np.errstate(all="ignore"):
        target, _ = dense_target(
            "gift",
            base_log_probs=base if library == "numpy" else torch.from_numpy(base),
            observed=np.array([1]),
            beta=beta,
        )

    np.testing.assert_allclose(target, [[0, 1, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "form", "model"),
    [(name, form, model) for (name, form), models in sorted(NEEDS.items()) for model in models],
)
def test_a_model_that_is_missing_is_asked_for(name: str, form: str, model: str) -> None:
    others = tuple(each for each in ("student", "base", "teacher") if each != model)

    with pytest.raises(UserError, match=rf"^{name.replace('+', '.')} needs {model}_log_probs$"):
        CASES[1].target(name, form, {}, models=others)


@pytest.mark.parametrize("form", FORMS["cft"])
def test_a_mask_that_is_missing_is_asked_for(form: str) -> None:
    case = CASES[1]
    with pytest.raises(UserError, match=r"^cft needs a mask$"):
        dense_target(
            "cft",
            form=form,
            student_log_probs=case.student,
            base_log_probs=case.base,
            observed=case.observed,
        )


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_no_model_at_all_is_an_error_that_says_so(name: str, form: str) -> None:
    case = CASES[1]
    with pytest.raises(UserError, match=r"needs .*_log_probs|needs a model"):
        dense_target(name, form=form, observed=case.observed, mask=case.mask)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", [bool, np.int64, np.float32])
@pytest.mark.parametrize("form", FORMS["cft"])
def test_a_mask_may_be_of_any_type(form: str, kind: type, library: str) -> None:
    case = CASES[3]
    mask = (case.mask > 0.5).astype(float)
    wanted = expected(replace(case, mask=mask), "cft", form, {})
    given_case = replace(case, mask=mask.astype(kind)).in_library(library)
    for got, want in zip(given_case.target("cft", form, {}), wanted, strict=True):
        assert got.dtype == given_case.base.dtype
        np.testing.assert_allclose(got, want, 1e-10, 1e-14)


# The gradients of the published losses.

Tensor = torch.Tensor


@dataclass(frozen=True)
class Losses:
    """What a published loss reads: logits with a gradient, and constants."""

    logits: Tensor  # [B, T, V]
    base: Tensor
    teacher: Tensor
    observed: Tensor
    mask: Tensor
    given: Parameters

    @property
    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits, -1)

    def at_observed(self, log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, self.observed[..., None])[..., 0]

    @property
    def nll(self) -> Tensor:
        return functional.cross_entropy(self.logits.movedim(-1, 1), self.observed, reduction="none")

    @property
    def prob(self) -> Tensor:
        """p_y, with its gradient."""
        return torch.softmax(self.logits, -1).gather(-1, self.observed[..., None])[..., 0]

    @property
    def base_prob(self) -> Tensor:
        return self.at_observed(self.base.exp())

    def divergence_from(self, log_target: Tensor) -> Tensor:
        """KL(target ‖ p)."""
        return functional.kl_div(self.log_probs, log_target, log_target=True, reduction="none").sum(
            -1
        )

    def cross_entropy_to(self, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            self.logits.movedim(-1, 1), target.detach().movedim(-1, 1), reduction="none"
        )


def eaft_loss(at: Losses) -> Tensor:
    top = torch.topk(at.logits.detach(), min(20, at.logits.shape[-1])).values
    return (torch.distributions.Categorical(logits=top).entropy() / 3.0) ** at.given["a"] * at.nll


def iw_sft_loss(at: Losses) -> Tensor:
    log_ratio = at.at_observed(at.log_probs.detach()) - at.at_observed(at.base)
    weight = torch.exp(at.given["T"] * log_ratio.mean(-1, keepdim=True)).clamp(0, 16)
    return weight * at.nll


def psft_loss(at: Losses) -> Tensor:
    """PPO's clipped surrogate with an advantage of 1."""
    ratio = at.prob / at.base_prob
    return -torch.minimum(ratio, ratio.clamp(1 - 0.2, 1 + at.given["eps_hi"]))


def gem_loss(at: Losses) -> Tensor:
    """−Σ_k a_k·(log p_y − log p_k), a without gradient."""
    pull = torch.softmax(at.logits / at.given["beta"], -1)
    if at.given["h"] == "logsigmoid":
        observed_logit = at.logits.gather(-1, at.observed[..., None])
        pull = pull * torch.sigmoid(0.01 * (at.logits - observed_logit))
    margin = at.at_observed(at.log_probs)[..., None] - at.log_probs
    return -(pull.detach() * margin).sum(-1)


def target_sft_loss(at: Losses) -> Tensor:
    eta = at.given["eta"]
    mixture = torch.softmax((1 - eta) * at.log_probs + eta * at.teacher, -1)
    trust = at.prob[..., None]
    return at.cross_entropy_to(
        trust * functional.one_hot(at.observed, mixture.shape[-1]) + (1 - trust) * mixture
    )


def gift_loss(at: Losses) -> Tensor:
    raised = at.base + at.given["beta"] * functional.one_hot(at.observed, at.base.shape[-1])
    return at.cross_entropy_to(torch.softmax(raised, -1))


def flow_loss(at: Losses) -> Tensor:
    losses = -at.at_observed(at.base)
    tau = at.given.get("tau", torch.quantile(losses.flatten(), 0.5).item())
    return torch.exp(-losses / tau) * at.nll


def token_cleaning_loss(at: Losses) -> Tensor:
    excess = (at.at_observed(at.teacher) - at.at_observed(at.base)).flatten()
    if "threshold" in at.given:
        kept = torch.nonzero(excess >= at.given["threshold"])[:, 0]
    else:
        kept = torch.argsort(excess, descending=True)[: int(len(excess) * at.given["keep"])]
    keep = torch.zeros_like(excess)
    keep[kept] = 1.0
    return keep.view(at.nll.shape) * at.nll


def contrast_loss(at: Losses) -> Tensor:
    teacher = at.teacher.exp()
    in_head = teacher >= at.given["alpha"] * teacher.max(-1, keepdim=True).values
    target = torch.where(in_head, teacher / at.base.exp(), 0.0)
    informative = functional.kl_div(at.base, at.teacher, log_target=True, reduction="none").sum(-1)
    selected = (informative >= at.given["beta"]).to(teacher.dtype)
    return selected * at.cross_entropy_to(target / target.sum(-1, keepdim=True))


def idft_loss(at: Losses) -> Tensor:
    prob = at.prob.detach()
    entropy_ = torch.distributions.Categorical(logits=at.logits.detach()).entropy()
    power = torch.exp(-(prob.log() + entropy_) / at.given["beta"]).clip(0.1, 2)
    return prob**power * at.nll


LOSSES: dict[str, Callable[[Losses], Tensor]] = {
    "sft": lambda at: at.nll,
    "dft": lambda at: at.prob.detach() * at.nll,
    "beyond-log": lambda at: (1 - at.prob ** at.given["alpha"]) / at.given["alpha"],
    "profit": lambda at: (at.prob.detach() >= at.given["tau"]) * at.nll,
    "eaft": eaft_loss,
    "iw-sft": iw_sft_loss,
    "cft": lambda at: at.mask * at.nll,
    "label-smoothing": lambda at: functional.cross_entropy(
        at.logits.movedim(-1, 1), at.observed, label_smoothing=at.given["lam"], reduction="none"
    ),
    "sft+kl": lambda at: at.nll + at.given["lam"] * at.divergence_from(at.base),
    "asft": lambda at: at.prob.detach() * at.nll + at.given["lam"] * at.divergence_from(at.base),
    "psft": psft_loss,
    "gem": gem_loss,
    "kd": lambda at: at.divergence_from(at.teacher),
    "kd-hybrid": lambda at: (
        (1 - at.given["lam"]) * at.nll + at.given["lam"] * at.divergence_from(at.teacher)
    ),
    "target-sft": target_sft_loss,
    "gift": gift_loss,
    "flow": flow_loss,
    "stm": lambda at: (at.base_prob >= at.given["tau"]) * at.nll,
    "token-cleaning": token_cleaning_loss,
    "contrast": contrast_loss,
    "idft": idft_loss,
    "trsft": lambda at: (at.prob.detach() / at.given["tau"]).clamp(max=1.0) * at.nll,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_published_loss(name: str) -> None:
    for case in (CASES[0], CASES[1], CASES[2], CASES[5], CASES[6], CASES[7]):
        assert name != "gift" or np.all(case.base > math.log(1e-10))  # its loss has no floor
        for given_parameters in [{}, *VARIANTS.get(name, [])]:
            tensors = case.in_library("torch")
            shift = torch.linspace(-3, 3, case.observed.size, dtype=torch.float64)
            logits = tensors.student + shift.view(case.observed.shape)[..., None]
            logits.requires_grad_()
            at = Losses(
                logits,
                tensors.base,
                tensors.teacher,
                tensors.observed,
                tensors.mask,
                DEFAULTS[name] | given_parameters,
            )
            LOSSES[name](at).sum().backward()
            target, scale = tensors.target(name, "live", given_parameters)

            np.testing.assert_allclose(
                scale[..., None] * (tensors.student.exp() - target),
                logits.grad,
                rtol=1e-10,
                atol=2e-15 * max(1, float(scale.max())) * 10,
                err_msg=f"{given_parameters}",
            )


def test_target_sft_has_no_gradient_through_its_target() -> None:
    """With it the gradient would be another one: the loss above detaches it, and must."""
    case = CASES[2].in_library("torch")
    logits = case.student.clone().requires_grad_()
    target, scale = dense_target(
        "target-sft",
        student_log_probs=logits.detach(),
        teacher_log_probs=case.teacher,
        observed=case.observed,
    )

    assert not target.requires_grad
    assert not scale.requires_grad


# The forms.


@pytest.mark.parametrize("name", sorted(name for name, forms in FORMS.items() if len(forms) > 1))
def test_every_form_has_the_live_gradient_while_the_student_is_the_base(name: str) -> None:
    for case in CASES:
        same = replace(case, student=case.base)
        for given_parameters in [{}, *VARIANTS.get(name, [])]:
            gradients = {}
            for form in FORMS[name]:
                target, scale = same.target(name, form, given_parameters)
                gradients[form] = scale[..., None] * (np.exp(same.base) - target)
            live = gradients.pop("live")
            assert gradients
            for form, gradient in gradients.items():
                np.testing.assert_allclose(gradient, live, 1e-10, 1e-14, err_msg=form)


def test_iw_sft_at_its_reference_is_sft() -> None:
    """Why its frozen form is refused."""
    for case in CASES:
        target, scale = replace(case, student=case.base).target("iw-sft", "live", {})
        sft_target, sft_scale = case.target("sft", "live", {})

        np.testing.assert_array_equal(target, sft_target)
        np.testing.assert_array_equal(scale, sft_scale)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("target-sft", {"eta": 0}), ("dft", {})),
        (("beyond-log", {"alpha": 1}), ("dft", {})),
        (("trsft", {"tau": 1}), ("dft", {})),
        (("kd-hybrid", {"lam": 1}), ("kd", {})),
        (("kd-hybrid", {"lam": 0}), ("sft", {})),
        (("sft+kl", {"lam": 0}), ("sft", {})),
        (("label-smoothing", {"lam": 0}), ("sft", {})),
        (("gem", {"beta": 1}), ("sft", {})),
        (("eaft", {"a": 0}), ("sft", {})),
    ],
)
def test_methods_that_meet_at_the_edge_of_a_parameter_are_the_same_there(
    first: tuple[str, Parameters], second: tuple[str, Parameters]
) -> None:
    for case in CASES:
        for got, want in zip(
            case.target(first[0], "live", first[1]),
            case.target(second[0], "live", second[1]),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, 1e-10, 1e-14)


def test_target_sft_at_the_teacher_is_kd_hybrid_with_the_likelihood_as_trust() -> None:
    for case in CASES:
        target, _ = case.target("target-sft", "live", {"eta": 1})
        for i, row in enumerate(case.observed):
            for t, y in enumerate(row):
                trust = math.exp(case.student[i, t, y])
                hybrid, _ = dense_target(
                    "kd-hybrid",
                    teacher_log_probs=case.teacher[i, t][None],
                    observed=np.array([y]),
                    lam=1 - trust,
                )
                np.testing.assert_allclose(target[i, t], hybrid[0], 1e-10, 1e-14)


# Statistics of the data set.


def flow_case(probs: list[float]) -> Case:
    """One token a row, of which the base gives the observed one these probabilities."""
    log_probs = np.log([[[prob, 1 - prob]] for prob in probs])
    observed = np.zeros((len(probs), 1), np.int64)
    return Case(log_probs, log_probs, log_probs, observed, np.ones(observed.shape))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("exponents", "median"),
    [
        ([3], 3),
        ([5, 1], 3),
        ([1, 7, 2], 2),
        ([8, 1, 2, 3], 2.5),
        ([2, 2, 2, 9], 2),
        ([9, 1, 8, 2, 7], 7),
        ([1, 2, 4, 8, 16, 32], 6),
    ],
)
def test_flow_raises_to_one_over_the_median_loss_of_the_data(
    exponents: list[int], median: float, library: str
) -> None:
    """At losses of k·log 2 and a median of m·log 2, b_y^(1/τ) is e^(−k/m)."""
    case = flow_case([2.0**-k for k in exponents]).in_library(library)
    _, scale = case.target("flow", "frozen-weight", {})

    wanted = [[math.exp(-k / median)] for k in exponents]
    np.testing.assert_allclose(scale, wanted, rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_explicit_tau_stands_above_the_median(library: str) -> None:
    case = flow_case([0.5, 0.25, 0.125]).in_library(library)
    _, scale = case.target("flow", "frozen-weight", {"τ": 0.5})

    np.testing.assert_allclose(scale, [[0.25], [0.0625], [0.015625]], rtol=1e-12)


def test_flow_on_data_of_which_the_base_is_certain_asks_for_another_tau() -> None:
    """A median of 0 leaves 1/τ without a value."""
    log_probs = np.array(
        [[[0.0, -math.inf]], [[0.0, -math.inf]], [[-0.5, math.log1p(-math.exp(-0.5))]]]
    )
    case = Case(log_probs, log_probs, log_probs, np.zeros((3, 1), np.int64), None)

    with pytest.raises(UserError, match=r"^flow: tau=0 is out of range: give above 0"):
        case.target("flow", "frozen-weight", {})
    _, scale = case.target("flow", "frozen-weight", {"tau": 1})
    np.testing.assert_allclose(scale, [[1], [1], [math.exp(-0.5)]], rtol=1e-12)


def cleaning_case(excesses: list[float]) -> Case:
    """One token a row; the teacher's log-probability of it exceeds the base's by so much."""
    base = np.log([[[0.25, 0.75]]] * len(excesses))
    teacher = base.copy()
    teacher[:, 0, 0] += excesses
    observed = np.zeros((len(excesses), 1), np.int64)
    return Case(base, base, teacher, observed, np.ones(observed.shape))


def kept(case: Case, given_parameters: Parameters) -> list[int]:
    """The places of the tokens that count."""
    _, scale = case.target("token-cleaning", "frozen-weight", given_parameters)
    values = np.asarray(scale)[:, 0]
    assert set(values.tolist()) <= {0.0, 1.0}
    return np.flatnonzero(values).tolist()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64, 100])
@pytest.mark.parametrize("keep", [0, 0.01, 0.29, 0.3, 0.5, 0.6, 0.7, 0.999, 1])
def test_token_cleaning_keeps_as_many_tokens_as_the_authors_do(
    count: int, keep: float, library: str
) -> None:
    excesses = np.random.default_rng(count).permutation(count) / 8 - 2
    authors = np.argsort(-excesses)[: int(count * keep)]
    case = cleaning_case(excesses.tolist()).in_library(library)

    assert kept(case, {"keep": keep}) == sorted(authors.tolist())


def test_token_cleaning_keeps_every_token_as_high_as_the_last_one_kept() -> None:
    """Half of six are three, but the third is one of three alike."""
    excesses = [0.5, -1.0, 0.5, 2.0, 0.5, 1.0]

    assert kept(cleaning_case(excesses), {"keep": 0.5}) == [0, 2, 3, 4, 5]
    assert kept(cleaning_case(excesses), {"keep": 0.34}) == [3, 5]


def test_token_cleaning_keeps_60_percent_where_nothing_is_said() -> None:
    assert kept(cleaning_case([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), {}) == [4, 5, 6, 7, 8, 9]


def test_an_explicit_threshold_stands_above_what_is_to_be_kept() -> None:
    case = cleaning_case([-0.5, 0.25, 0.75, 1.5])

    assert kept(case, {"threshold": 0.5}) == [2, 3]
    assert kept(case, {"threshold": 0.5, "keep": 0}) == [2, 3]
    assert kept(case, {"threshold": 0.5, "keep": 1}) == [2, 3]
    assert kept(case, {"threshold": -1}) == [0, 1, 2, 3]
    assert kept(case, {"threshold": 9}) == []


def test_the_statistic_is_that_of_all_examples_together() -> None:
    """Cut into examples in another way, the same tokens have the same trusts."""
    case = CASES[3]
    as_one = Case(*(value.reshape(1, -1, *value.shape[2:]) for value in vars(case).values()))
    for name in ("flow", "token-cleaning"):
        _, scale = case.target(name, "frozen-weight", {})
        _, scale_as_one = as_one.target(name, "frozen-weight", {})
        np.testing.assert_array_equal(scale.reshape(-1), scale_as_one[0])


# Properties.

PARAMETER_RANGES: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("beyond-log", "alpha"): st.floats(1e-6, 1e6),
    ("profit", "tau"): st.floats(1e-300, 1),
    ("eaft", "a"): st.floats(0, 1e6),
    ("iw-sft", "T"): st.floats(0, 1e6),
    ("label-smoothing", "lam"): st.floats(0, 1),
    ("sft+kl", "lam"): st.floats(0, 1e6),
    ("asft", "lam"): st.floats(0, 1e6),
    ("psft", "eps_hi"): st.floats(0, 1e6),
    ("gem", "beta"): st.floats(1e-3, 1e6),
    ("gem", "h"): st.sampled_from(["linear", "logsigmoid"]),
    ("kd-hybrid", "lam"): st.floats(0, 1),
    ("target-sft", "eta"): st.floats(0, 1),
    ("gift", "beta"): st.floats(0, 500),
    ("flow", "tau"): st.floats(1e-6, 1e6),
    ("stm", "tau"): st.floats(1e-300, 1),
    ("token-cleaning", "keep"): st.floats(0, 1),
    ("token-cleaning", "threshold"): st.floats(-1e6, 1e6),
    ("contrast", "alpha"): st.floats(1e-300, 1),
    ("contrast", "beta"): st.floats(0, 1e6),
    ("idft", "beta"): st.floats(1e-6, 1e6),
    ("trsft", "tau"): st.floats(1e-300, 1),
}


@st.composite
def drawn_choices(draw: st.DrawFn) -> tuple[str, str, Parameters]:
    name, form = draw(st.sampled_from(PAIRS))
    own = {key: values for (method, key), values in PARAMETER_RANGES.items() if method == name}
    return name, form, draw(st.fixed_dictionaries({}, optional=own))


@settings(max_examples=600, deadline=None)
@given(
    chosen=drawn_choices(),
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 40)),
    spread=st.floats(0.01, 60),
    library=st.sampled_from(LIBRARIES),
)
def test_a_target_is_a_distribution_and_a_scale_is_finite_and_not_negative(
    chosen: tuple[str, str, Parameters],
    seed: int,
    sizes: tuple[int, int, int],
    spread: float,
    library: str,
) -> None:
    name, form, given_parameters = chosen
    case = make_case(seed, *sizes, spread)
    losses = tokens_of(case, "live")[0][0].losses
    assume(name != "flow" or "tau" in given_parameters or statistics.median(losses) > 0)
    target, scale = map(np.asarray, case.in_library(library).target(name, form, given_parameters))

    assert np.all(np.isfinite(target))
    assert np.all(np.isfinite(scale))
    assert np.all(scale >= 0)
    np.testing.assert_allclose(target.sum(-1), 1, atol=1e-11)
    if name != "gem":
        assert target.min() >= 0


# Extremes: an extreme position among ordinary ones.

NONE = -math.inf
ORDINARY = [math.log(share) for share in (0.4, 0.3, 0.15, 0.1, 0.05)]
TURNED = [math.log(share) for share in (0.2, 0.35, 0.1, 0.2, 0.15)]
SKEWED = [math.log(share) for share in (0.7, 0.1, 0.1, 0.05, 0.05)]
CERTAIN = [0.0, NONE, NONE, NONE, NONE]
HALVES = [math.log(0.5), math.log(0.5), NONE, NONE, NONE]
OTHER_HALVES = [math.log(0.25), math.log(0.75), NONE, NONE, NONE]
UNLIKELY = [-700.0, math.log(0.4), math.log(0.3), math.log(0.2), math.log(0.1)]
IMPOSSIBLE = [NONE, *UNLIKELY[1:]]
SMALL = [math.log(0.01), math.log(0.2), math.log(0.3), math.log(0.4), math.log(0.09)]
# student, base, teacher; the observed token is the first
EXTREMES: dict[str, tuple[list[float], list[float], list[float]]] = {
    "certain to all": (CERTAIN, CERTAIN, CERTAIN),
    "certain to the student": (CERTAIN, ORDINARY, TURNED),
    "certain to the base": (ORDINARY, CERTAIN, CERTAIN),
    "certain to the teacher": (ORDINARY, TURNED, CERTAIN),
    "at -700 to all": (UNLIKELY, UNLIKELY, UNLIKELY),
    "at -700 to the student": (UNLIKELY, ORDINARY, TURNED),
    "at -700 to the base": (ORDINARY, UNLIKELY, TURNED),
    "at -700 to the teacher": (ORDINARY, TURNED, UNLIKELY),
    "impossible to the student": (IMPOSSIBLE, ORDINARY, TURNED),
    "impossible to the base": (ORDINARY, IMPOSSIBLE, SMALL),
    "impossible to the teacher": (ORDINARY, TURNED, IMPOSSIBLE),
    "impossible to student and teacher": (IMPOSSIBLE, ORDINARY, IMPOSSIBLE),
    "others impossible to all": (HALVES, OTHER_HALVES, HALVES),
    "others impossible to student and teacher": (HALVES, ORDINARY, OTHER_HALVES),
}


def extreme_case(kind: str) -> Case:
    extreme = np.array(EXTREMES[kind])[:, None]
    before = np.array([ORDINARY, TURNED, SKEWED])[:, None]
    after = np.array([SKEWED, ORDINARY, TURNED])[:, None]
    models = np.concatenate([before, extreme, after, before], axis=1)[:, None]
    return Case(*models, np.array([[1, 0, 2, 3]]), np.array([[1.0, 0.5, 0.0, 1.0]]))


def assert_right(case: Case, name: str, form: str, given: Parameters, library: str) -> None:
    wanted_target, wanted_scale = expected(case, name, form, given)
    with np.errstate(all="ignore"):
        target, scale = case.in_library(library).target(name, form, given)

    assert np.all(np.isfinite(wanted_target))
    assert np.all(np.isfinite(wanted_scale))
    np.testing.assert_allclose(target, wanted_target, 1e-10, 1e-14)
    np.testing.assert_allclose(scale, wanted_scale, 1e-10, 1e-14)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_extreme_probabilities_have_their_right_target(
    name: str, form: str, kind: str, library: str
) -> None:
    assert_right(extreme_case(kind), name, form, {}, library)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_probabilities_have_their_right_pull_in_gem(kind: str, library: str) -> None:
    assert_right(extreme_case(kind), "gem", "live", {"h": "logsigmoid"}, library)


def test_an_anchor_without_a_share_has_no_trust_and_no_weight_where_the_student_has_none() -> None:
    """0/(0 + 0): nothing is learned there, whatever stands for the trust."""
    log_probs = np.array([IMPOSSIBLE, ORDINARY])
    target, scale = dense_target(
        "asft",
        student_log_probs=log_probs,
        base_log_probs=log_probs,
        observed=np.array([0, 0]),
        lam=0,
    )

    assert np.all(np.isfinite(target))
    np.testing.assert_allclose(scale, [0, 0.4], rtol=1e-12)
