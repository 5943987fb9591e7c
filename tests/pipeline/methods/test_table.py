"""The table of methods and their forms, against methods.md."""

import math

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

from .refusals import refusal

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
