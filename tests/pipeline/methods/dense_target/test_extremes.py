"""Any parameters of any models, and probabilities of 0, of 1 and next to them."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.methods import dense_target
from qpipe.tests.support.methods import DIVERGENCES, FACTS, Parameters

from .cases import LIBRARIES, Case, make_case
from .formulas import expected, tokens_of

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
    ("mixed-kl", "lam"): st.floats(0, 1),
    ("jsd", "beta"): st.floats(0, 1),
    ("skew-kl", "alpha"): st.floats(1e-3, 0.999),
    ("skew-reverse-kl", "alpha"): st.floats(1e-3, 0.999),
    ("gift", "beta"): st.floats(0, 500),
    ("flow", "tau"): st.floats(1e-6, 1e6),
    ("stm", "tau"): st.floats(1e-300, 1),
    ("token-cleaning", "keep"): st.floats(0, 1),
    ("token-cleaning", "threshold"): st.floats(-1e6, 1e6),
    ("contrast", "alpha"): st.floats(1e-300, 1),
    ("contrast", "beta"): st.floats(0, 1e6),
    ("idft", "beta"): st.floats(1e-6, 1e6),
    ("trsft", "tau"): st.floats(1e-300, 1),
    ("prift-mass", "tau"): st.floats(1e-300, 1),
    ("infosft", "P"): st.floats(0.501, 0.9999),
    ("talr", "tau"): st.floats(1e-6, 1e6),
    ("talr", "floor"): st.floats(0, 1),
    ("ranktuner", "power"): st.floats(0, 1e6),
    ("se-kd", "keep"): st.floats(0, 1),
    ("se-kd", "threshold"): st.floats(-1e6, 1e6),
    ("tip", "keep"): st.floats(0, 1),
    ("tip", "threshold"): st.floats(-1e6, 1e6),
    ("amid", "eta"): st.floats(0, 1),
    ("amid", "alpha"): st.floats(-1, 5),
}


@st.composite
def drawn_choices(draw: st.DrawFn) -> tuple[str, str, Parameters]:
    name, form = draw(st.sampled_from(sorted(FACTS)))
    own = {key: values for (method, key), values in PARAMETER_RANGES.items() if method == name}
    return name, form, draw(st.fixed_dictionaries({}, optional=own))


@settings(max_examples=300, deadline=None)
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
    assume(
        name not in ("flow", "talr") or "tau" in given_parameters or statistics.median(losses) > 0
    )
    target, scale = map(np.asarray, case.in_library(library).target(name, form, given_parameters))

    assert np.all(np.isfinite(target))
    assert np.all(np.isfinite(scale))
    assert np.all(scale >= 0)
    np.testing.assert_allclose(target.sum(-1), 1, atol=1e-11)
    if name not in ("gem", *DIVERGENCES):
        assert target.min() >= 0


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


def assert_right(name: str, form: str, given: Parameters) -> None:
    """In every case and library: in loops, as tests of their own would take twice the time."""
    for kind in EXTREMES:
        case = extreme_case(kind)
        wanted_target, wanted_scale = expected(case, name, form, given)
        assert np.all(np.isfinite(wanted_target)), kind
        assert np.all(np.isfinite(wanted_scale)), kind
        for library in LIBRARIES:
            with np.errstate(all="ignore"):
                target, scale = case.in_library(library).target(name, form, given)
            message = f"{kind}, {library}"
            np.testing.assert_allclose(target, wanted_target, 1e-10, 1e-14, err_msg=message)
            np.testing.assert_allclose(scale, wanted_scale, 1e-10, 1e-14, err_msg=message)


@pytest.mark.parametrize(("name", "form"), FACTS)
def test_extreme_probabilities_have_their_right_target(name: str, form: str) -> None:
    assert_right(name, form, {})


def test_extreme_probabilities_have_their_right_pull_in_gem() -> None:
    assert_right("gem", "live", {"h": "logsigmoid"})


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
