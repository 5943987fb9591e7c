"""Names and parameters of a choice, with the ranges of methods.md."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from qpipe.pipeline.methods.table import (
    METHODS,
    choose,
)
from qpipe.tests.support.methods import FACTS, NAMES
from qpipe.tests.support.tiers import names_of_six_kinds

from .refusals import refusal

_FAR = 1e6
# method, parameter: default, lowest, highest, whether the lowest itself is out
PARAMETERS: dict[tuple[str, str], tuple[float | None, float, float, bool]] = {
    ("beyond-log", "alpha"): (8, 0, _FAR, True),
    ("profit", "tau"): (0.1, 0, 1, True),
    ("eaft", "a"): (1, 0, _FAR, False),
    ("iw-sft", "T"): (1, 0, _FAR, False),
    ("label-smoothing", "lam"): (0.1, 0, 1, False),
    ("sft+kl", "lam"): (0.1, 0, _FAR, False),
    ("asft", "lam"): (0.1, 0, _FAR, False),
    ("psft", "eps_hi"): (0.28, 0, _FAR, False),
    ("gem", "beta"): (0.7, 0, _FAR, True),
    ("kd-hybrid", "lam"): (0.5, 0, 1, False),
    ("target-sft", "eta"): (0.5, 0, 1, False),
    ("mixed-kl", "lam"): (0.5, 0, 1, False),
    ("jsd", "beta"): (0.5, 0, 1, False),
    ("skew-kl", "alpha"): (0.1, 0.001, 0.999, False),
    ("skew-reverse-kl", "alpha"): (0.1, 0.001, 0.999, False),
    ("gift", "beta"): (20, 0, 500, False),
    ("flow", "tau"): (None, 0, _FAR, True),
    ("stm", "tau"): (0.4, 0, 1, True),
    ("token-cleaning", "keep"): (0.6, 0, 1, False),
    ("token-cleaning", "threshold"): (None, -_FAR, _FAR, False),
    ("contrast", "alpha"): (0.2, 0, 1, True),
    ("contrast", "beta"): (0.4, 0, _FAR, False),
    ("idft", "beta"): (1, 0, _FAR, True),
    ("trsft", "tau"): (0.1, 0, 1, True),
    ("prift-mass", "tau"): (0.5, 0, 1, True),
    ("infosft", "P"): (0.93, 0.501, 0.999999, False),
    ("talr", "tau"): (None, 0, _FAR, True),
    ("talr", "floor"): (0.01, 0, 1, False),
    ("ranktuner", "power"): (0, 0, _FAR, False),
    ("se-kd", "keep"): (0.2, 0, 1, False),
    ("se-kd", "threshold"): (None, -_FAR, _FAR, False),
    ("tip", "keep"): (0.2, 0, 1, False),
    ("tip", "threshold"): (None, -_FAR, _FAR, False),
    ("amid", "eta"): (0.5, 0, 1, False),
    ("amid", "alpha"): (0, -1, 5, False),
}


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    assert refusal("stf") == f"method 'stf' is not known: choose one of {', '.join(NAMES)}"


@pytest.mark.parametrize("name", ["", "SFT", "sft_kl", "sft ", "target_sft"])
def test_a_method_has_one_spelling(name: str) -> None:
    assert refusal(name).startswith(f"method {name!r} is not known: choose one of sft, dft, ")


def test_every_parameter_of_every_method_is_in_these_tests() -> None:
    known = {(m.name, parameter.name) for m in METHODS.values() for parameter in m.parameters}

    assert known == {*PARAMETERS, ("gem", "h")}


@pytest.mark.parametrize("name", list(NAMES))
def test_defaults_are_those_of_the_papers(name: str) -> None:
    defaults: dict[str, Any] = {
        parameter: default
        for (method, parameter), (default, *_) in PARAMETERS.items()
        if method == name and default is not None
    }
    if name == "gem":
        defaults["h"] = "linear"
    for each, form in FACTS:
        if each == name:
            assert choose(name, form).parameters == defaults


def ranges() -> Iterator[tuple[str, str, list[float], str]]:
    """Every parameter with values that are not allowed, and the allowed range in words."""
    for (name, parameter), (_, low, high, above) in PARAMETERS.items():
        words = f"above {low:g}, to {high:g}" if above else f"{low:g} to {high:g}"
        below = low if above else math.nextafter(low, -math.inf)
        beyond = math.nextafter(high, math.inf)
        values = [below, low - 1, beyond, high * 2, math.nan, math.inf, -math.inf]
        yield name, parameter, values, words


@pytest.mark.parametrize(("name", "parameter", "values", "allowed"), list(ranges()))
def test_a_parameter_out_of_range_is_refused_with_the_range(
    name: str, parameter: str, values: list[float], allowed: str
) -> None:
    for value in values:
        message = refusal(name, given={parameter: value})
        assert message == f"{name}: {parameter}={value:g} is out of range: give {allowed}"
        for form in METHODS[name].forms:
            assert refusal(name, form, {parameter: value}) == message


@pytest.mark.parametrize(("pair", "limits"), PARAMETERS.items())
def test_a_parameter_at_the_edge_of_its_range_is_taken(
    pair: tuple[str, str], limits: tuple[float | None, float, float, bool]
) -> None:
    name, parameter = pair
    _, low, high, above = limits
    lowest = math.nextafter(low, math.inf) if above else low
    for value in (lowest, high, (low + high) / 2):
        assert choose(name, given={parameter: value}).parameters[parameter] == value


@pytest.mark.parametrize(("pair", "limits"), PARAMETERS.items())
def test_a_parameter_that_is_no_number_is_refused(
    pair: tuple[str, str], limits: tuple[float | None, float, float, bool]
) -> None:
    name, parameter = pair
    _, low, high, above = limits
    allowed = f"above {low:g}, to {high:g}" if above else f"{low:g} to {high:g}"
    values: list[Any] = ["much", "", "0.1.2", "1,5", None, [0.1], {}]
    for value in values:
        assert refusal(name, given={parameter: value}) == (
            f"{name}: {parameter}={value} is not a number: give {allowed}"
        )


@pytest.mark.parametrize("value", ["", "LINEAR", "log-sigmoid", 1, None, math.nan])
def test_a_parameter_in_words_takes_its_words_alone(value: Any) -> None:
    assert refusal("gem", given={"h": value}) == (
        f"gem: h={value} is not known: give one of linear, logsigmoid"
    )


@pytest.mark.parametrize("value", ["linear", "logsigmoid"])
def test_a_parameter_in_words_is_one_of_its_words(value: str) -> None:
    assert choose("gem", given={"h": value}).parameters == {"beta": 0.7, "h": value}


def test_a_number_in_words_of_the_command_line_is_a_number() -> None:
    assert choose("gift", given={"beta": "5"}).parameters == {"beta": 5.0}
    assert refusal("gift", given={"beta": "nan"}) == (
        "gift: beta=nan is out of range: give 0 to 500"
    )


def test_a_whole_number_too_large_for_a_float_is_refused() -> None:
    refusal("gift", given={"beta": 10**400})


SPELLINGS = {
    "lam": ("λ", "lambda"),
    "alpha": ("α",),
    "beta": ("β",),
    "eta": ("η",),
    "tau": ("τ",),
    "eps_hi": ("ε", "eps", "epsilon"),
}


@pytest.mark.parametrize(
    ("name", "parameter", "spelling"),
    [
        (name, parameter, spelling)
        for name, parameter in PARAMETERS
        for spelling in SPELLINGS.get(parameter, ())
    ],
)
def test_greek_and_long_names_mean_the_same_parameter(
    name: str, parameter: str, spelling: str
) -> None:
    plain = choose(name, given={parameter: 0.25})

    assert plain.parameters[parameter] == 0.25
    assert choose(name, given={spelling: 0.25}) == plain
    assert refusal(name, given={spelling: math.nan}) == refusal(name, given={parameter: math.nan})


@pytest.mark.parametrize("name", names_of_six_kinds(list(NAMES)))
@pytest.mark.parametrize("wrong", ["gamma", "", "LAM", "lam ", "γ"])
def test_an_unknown_parameter_is_refused_with_the_known_ones(name: str, wrong: str) -> None:
    own = [parameter for method, parameter in PARAMETERS if method == name]
    own += ["h"] * (name == "gem")

    assert refusal(name, given={wrong: 0.1}) == (
        f"{name} has no parameter {wrong!r}: its parameters: {', '.join(own) or 'none'}"
    )


def test_a_parameter_of_another_method_is_unknown() -> None:
    assert refusal("gift", given={"λ": 0.1}) == "gift has no parameter 'λ': its parameters: beta"
    assert refusal("sft", given={"lam": 0.1}) == "sft has no parameter 'lam': its parameters: none"


def test_a_whole_number_is_the_same_parameter_as_its_float() -> None:
    assert repr(choose("gift", given={"beta": 5}).parameters) == "{'beta': 5.0}"


def test_choosing_does_not_keep_hold_of_what_was_given() -> None:
    given = {"beta": 5.0}
    choice = choose("gift", given=given)
    given["beta"] = 7.0

    assert choice.parameters == {"beta": 5.0}
    assert choose("gift").parameters == {"beta": 20.0}
