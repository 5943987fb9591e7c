"""Choosing a method, its form and its parameters, and the table of methods, against methods.md."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods.table import (
    DEFAULT_METHOD,
    DEFAULT_METHOD_WITH_TEACHER,
    METHODS,
    choices,
    choose,
)
from qpipe.pipeline.methods.words import needs, table
from qpipe.tests.support.methods import DIVERGENCES, FACTS, LIVE, TARGET, WEIGHT, Facts
from qpipe.tests.support.tiers import names_of_six_kinds

# name: source, where methods.md names one
SOURCES: dict[str, str | None] = {
    "sft": None,
    "dft": "2508.05629",
    "beyond-log": "2510.00526",
    "profit": "2601.09195",
    "eaft": "2601.02151",
    "iw-sft": "2507.12856",
    "cft": "2510.10974",
    "label-smoothing": None,
    "sft+kl": "2509.04259",
    "asft": "2509.23753",
    "psft": "2508.17784",
    "gem": "2408.16673",
    "kd": "1503.02531",
    "kd-hybrid": None,
    "target-sft": "2606.11189",
    "reverse-kl": "2306.08543",
    "mixed-kl": "2404.02657",
    "jsd": "2306.13649",
    "skew-kl": "2402.03898",
    "skew-reverse-kl": "2402.03898",
    "gift": "2601.09233",
    "flow": "2502.02797",
    "stm": "2501.14315",
    "token-cleaning": "2502.01968",
    "contrast": "2510.07962",
    "idft": "2602.12222",
    "trsft": None,
    "prift-prob": "2606.09396",
    "prift-mass": "2606.09396",
    "infosft": "2605.14967",
    "deft": "2602.11424",
    "talr": "2509.20758",
    "ranktuner": "2602.01745",
    "se-kd": "2602.01395",
    "tip": "2604.14084",
    "amid": "2510.15982",
}

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

IS_SFT = "with the base as reference the ratio is 1 everywhere: that is sft"
NO_RESIDUAL = "a weight alone would drop its residual, and with it what it is for"
IS_WEIGHT = "its residual is the observed token: that is frozen-weight"
NOT_FIXED = "its gradient is not that of a cross-entropy to a fixed target: take kd"
REFUSED: dict[tuple[str, str], str] = {
    ("iw-sft", TARGET): IS_SFT,
    ("iw-sft", WEIGHT): IS_SFT,
    ("psft", TARGET): IS_SFT,
    ("psft", WEIGHT): IS_SFT,
    ("gem", TARGET): "with the base's gradient at every step the loss has no lower bound",
    ("gem", WEIGHT): "it is not a weighted likelihood",
    ("idft", TARGET): "it needs the entropy over the whole vocabulary, which scores do not hold",
    ("idft", WEIGHT): "it needs the entropy over the whole vocabulary, which scores do not hold",
    ("trsft", TARGET): "its region is around the model as it trains: take dft or profit",
    ("trsft", WEIGHT): "its region is around the model as it trains: take dft or profit",
    ("label-smoothing", WEIGHT): NO_RESIDUAL,
    ("sft+kl", WEIGHT): NO_RESIDUAL,
    ("asft", WEIGHT): NO_RESIDUAL,
    ("kd", WEIGHT): NO_RESIDUAL,
    ("kd-hybrid", WEIGHT): NO_RESIDUAL,
    ("target-sft", WEIGHT): NO_RESIDUAL,
    ("gift", WEIGHT): NO_RESIDUAL,
    ("contrast", WEIGHT): NO_RESIDUAL,
    ("se-kd", WEIGHT): NO_RESIDUAL,
    ("tip", WEIGHT): NO_RESIDUAL,
    ("amid", WEIGHT): NO_RESIDUAL,
    ("infosft", TARGET): IS_WEIGHT,
    ("ranktuner", TARGET): IS_WEIGHT,
    **{(name, form): NOT_FIXED for name in DIVERGENCES for form in (TARGET, WEIGHT)},
}


def refusal(*arguments: Any, **keywords: Any) -> str:
    """What choose says, which must be one line."""
    with pytest.raises(UserError) as refused:
        choose(*arguments, **keywords)
    message = str(refused.value)
    assert message
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    return message


# The table.


def test_every_method_and_no_other_is_in_the_table_in_the_order_of_the_papers() -> None:
    assert list(METHODS) == list(SOURCES)
    assert [method.name for method in METHODS.values()] == list(SOURCES)
    assert [row["name"] for row in table()] == list(SOURCES)


@pytest.mark.parametrize(("name", "source"), SOURCES.items())
def test_every_method_names_its_source(name: str, source: str | None) -> None:
    (row,) = (row for row in table() if row["name"] == name)

    assert row["source"] == METHODS[name].source
    assert row["source"]
    if source:
        assert row["source"] == f"arXiv {source}"


def test_choices_are_every_method_in_every_form_the_first_of_them_the_default() -> None:
    seen = [(choice.method.name, choice.form) for choice in choices()]

    assert seen == list(FACTS)
    for name in SOURCES:
        first = next(form for each, form in FACTS if each == name)
        assert choose(name).form == first
        assert choose(name, first) == choose(name)


@pytest.mark.parametrize(("pair", "wanted"), FACTS.items())
def test_what_each_form_of_each_method_needs(pair: tuple[str, str], wanted: Facts) -> None:
    choice = choose(*pair)
    letters = wanted.letters

    assert choice.stored == wanted.stored
    assert choice.needs_teacher == ("t" in letters)
    assert choice.needs_mask == ("m" in letters)
    assert choice.reads_student == ("s" in letters)
    assert choice.is_weight == ("w" in letters)


def test_nothing_is_stored_but_for_what_methods_md_says() -> None:
    """By its section "What each needs stored"."""
    needs_nothing = {("sft", form) for form in (LIVE, TARGET)}
    needs_nothing |= {("label-smoothing", form) for form in (LIVE, TARGET)}
    needs_nothing |= {
        (name, LIVE)
        for name in ("dft", "beyond-log", "profit", "eaft", "gem", "idft", "trsft", "deft", "talr")
    }
    needs_nothing |= {(name, LIVE) for name in ("infosft", "ranktuner")}
    one_float = {
        (name, LIVE) for name in ("iw-sft", "psft", "flow", "stm", "token-cleaning", "cft")
    }
    one_float |= {(name, LIVE) for name in ("prift-prob", "prift-mass")}
    one_float |= {pair for pair in FACTS if pair[1] == WEIGHT}
    for pair in FACTS:
        is_sparse = choose(*pair).stored not in ("observed", "base-observed", "uniform")
        assert is_sparse == (pair not in needs_nothing | one_float), pair


STATISTICS = {
    "flow": "tau",
    "token-cleaning": "threshold",
    "talr": "tau",
    "se-kd": "threshold",
    "tip": "threshold",
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_sought_where_its_parameter_is_not_given(name: str) -> None:
    parameter = STATISTICS[name]
    for form in METHODS[name].forms:
        open_choice = choose(name, form)
        statistic = open_choice.unresolved
        assert statistic is not None
        assert statistic.parameter == parameter
        assert parameter not in open_choice.parameters

        assert choose(name, form, {parameter: 0.5}).unresolved is None
        resolved = open_choice.resolved(0.5)
        assert resolved.unresolved is None
        assert resolved == choose(name, form, {parameter: 0.5})
        assert parameter not in open_choice.parameters


def test_a_statistic_of_no_use_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^flow: tau=0 is out of range: give above 0, to 1e\+06 \(the data"
    ):
        choose("flow").resolved(0.0)
    with pytest.raises(UserError, match=r"^token-cleaning: threshold=nan is out of range: give"):
        choose("token-cleaning").resolved(math.nan)


def test_no_other_method_has_a_statistic() -> None:
    found = {choice.method.name for choice in choices() if choice.unresolved is not None}

    assert found == set(STATISTICS)


def test_a_median_is_the_mean_of_the_middle_two() -> None:
    statistic = METHODS["flow"].statistic
    assert statistic is not None

    assert [statistic.places(count, {}) for count in range(6)] == [
        (),
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("count", "keep", "place"),
    [(0, 1.0, ()), (5, 0.0, ()), (1, 0.9, ()), (10, 0.6, (4,)), (10, 1.0, (0,)), (3, 0.5, (2,))],
)
def test_the_threshold_is_at_the_last_of_the_tokens_that_are_kept(
    count: int, keep: float, place: tuple[int, ...]
) -> None:
    statistic = METHODS["token-cleaning"].statistic
    assert statistic is not None

    assert statistic.places(count, {"keep": keep}) == place


def test_default_methods() -> None:
    assert (DEFAULT_METHOD, DEFAULT_METHOD_WITH_TEACHER) == ("sft+kl", "kd")
    assert choose(DEFAULT_METHOD).form == TARGET
    assert choose(DEFAULT_METHOD).parameters == {"lam": 0.1}
    assert not choose(DEFAULT_METHOD).needs_teacher
    assert choose(DEFAULT_METHOD_WITH_TEACHER).form == TARGET
    assert choose(DEFAULT_METHOD_WITH_TEACHER).parameters == {}
    assert choose(DEFAULT_METHOD_WITH_TEACHER).needs_teacher


def test_the_table_in_words() -> None:
    rows: dict[str, dict[str, str]] = {row["name"]: row for row in table()}

    assert all(all(words for words in row.values()) for row in rows.values())
    assert all(len({len(row) for row in rows.values()}) == 1 for row in rows.values())
    assert rows["gift"]["parameters"] == "beta=20 (0 to 500)"
    assert rows["gem"]["parameters"] == (
        "beta=0.7 (above 0, to 1e+06), h=linear (one of linear, logsigmoid)"
    )
    assert rows["flow"]["parameters"] == "tau=of the data (above 0, to 1e+06)"
    assert rows["sft"]["parameters"] == "-"
    assert rows["dft"]["forms"] == "frozen-target, frozen-weight, live"
    assert {name: row["residual"] for name, row in rows.items()} == {
        **dict.fromkeys(("sft", "iw-sft", "psft", "gem", "infosft", "ranktuner"), "-"),
        **dict.fromkeys(("dft", "beyond-log", "profit", "eaft", "cft", "deft", "talr"), "p"),
        **dict.fromkeys(("prift-prob", "prift-mass"), "p"),
        **dict.fromkeys(("flow", "stm", "token-cleaning", "idft", "trsft"), "p"),
        **dict.fromkeys(("sft+kl", "asft", "gift"), "b"),
        **dict.fromkeys(("kd", "kd-hybrid", *DIVERGENCES, "se-kd", "tip"), "q"),
        "amid": "~ ((1-eta) p^a + eta q^a)^(1/a), a = (1-alpha)/2",
        "label-smoothing": "1/V",
        "target-sft": "~ p^(1-eta) q^eta",
        "contrast": "~ q/b where q >= alpha max q",
    }
    assert rows["sft+kl"]["scale"] == "1+lam"
    assert [name for name, row in rows.items() if row["scale"] != "1"] == [
        "iw-sft",
        "sft+kl",
        "asft",
        "psft",
        "contrast",
        "infosft",
        "ranktuner",
        "se-kd",
        "tip",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sft", "-"),
        ("gem", "-"),
        ("label-smoothing", "-"),
        ("dft", "frozen-target: b; frozen-weight: a weight; live: -"),
        ("iw-sft", "b_y"),
        ("sft+kl", "b"),
        ("kd", "q + --teacher"),
        ("target-sft", "frozen-target: b^(1-eta) q^eta + --teacher; live: q + --teacher"),
        ("jsd", "q + --teacher"),
        ("amid", "frozen-target: the mixture of b and q + --teacher; live: q + --teacher"),
        ("se-kd", "q + --teacher"),
        ("ranktuner", "frozen-weight: a weight; live: -"),
        ("stm", "frozen-weight: a weight; frozen-target: b; live: a weight"),
        ("contrast", "q/b + --teacher"),
    ],
)
def test_needs_in_words(name: str, words: str) -> None:
    assert needs(METHODS[name]) == words


# Forms.


def test_every_form_is_there_or_refused_with_a_reason() -> None:
    forms = (LIVE, TARGET, WEIGHT)

    assert set(FACTS) | set(REFUSED) == {(name, form) for name in SOURCES for form in forms}
    assert not set(FACTS) & set(REFUSED)
    assert len(FACTS) == 75


@pytest.mark.parametrize(("pair", "reason"), REFUSED.items())
def test_a_refused_form_says_why_and_what_there_is(pair: tuple[str, str], reason: str) -> None:
    name, form = pair
    there = ", ".join(each for method, each in FACTS if method == name)

    assert refusal(name, form) == f"{name} has no form '{form}' ({reason}): choose one of {there}"


@pytest.mark.parametrize("name", names_of_six_kinds(list(SOURCES)))
@pytest.mark.parametrize("form", ["frozen", "Live", "", "live "])
def test_an_unknown_form_is_refused_with_the_known_ones(name: str, form: str) -> None:
    there = ", ".join(each for method, each in FACTS if method == name)

    assert refusal(name, form) == f"{name} has no form {form!r}: choose one of {there}"


# Names and parameters.


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    assert refusal("stf") == f"method 'stf' is not known: choose one of {', '.join(SOURCES)}"


@pytest.mark.parametrize("name", ["", "SFT", "sft_kl", "sft ", "target_sft"])
def test_a_method_has_one_spelling(name: str) -> None:
    assert refusal(name).startswith(f"method {name!r} is not known: choose one of sft, dft, ")


def test_every_parameter_of_every_method_is_in_these_tests() -> None:
    known = {(m.name, parameter.name) for m in METHODS.values() for parameter in m.parameters}

    assert known == {*PARAMETERS, ("gem", "h")}


@pytest.mark.parametrize("name", list(SOURCES))
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


def ranges() -> Iterator[tuple[str, str, float, str]]:
    """Every parameter with a value that is not allowed, and the allowed range in words."""
    for (name, parameter), (_, low, high, above) in PARAMETERS.items():
        words = f"above {low:g}, to {high:g}" if above else f"{low:g} to {high:g}"
        below = low if above else math.nextafter(low, -math.inf)
        beyond = math.nextafter(high, math.inf)
        for value in (below, low - 1, beyond, high * 2, math.nan, math.inf, -math.inf):
            yield name, parameter, value, words


@pytest.mark.parametrize(("name", "parameter", "value", "allowed"), list(ranges()))
def test_a_parameter_out_of_range_is_refused_with_the_range(
    name: str, parameter: str, value: float, allowed: str
) -> None:
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
@pytest.mark.parametrize("value", ["much", "", "0.1.2", "1,5", None, [0.1], {}])
def test_a_parameter_that_is_no_number_is_refused(
    pair: tuple[str, str], limits: tuple[float | None, float, float, bool], value: Any
) -> None:
    name, parameter = pair
    _, low, high, above = limits
    allowed = f"above {low:g}, to {high:g}" if above else f"{low:g} to {high:g}"

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


@pytest.mark.parametrize("name", names_of_six_kinds(list(SOURCES)))
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
