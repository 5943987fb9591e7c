"""What a dense target is given: positions without a batch, masks, and models that are missing."""

from dataclasses import replace

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods import dense_target
from qpipe.tests.support.methods import FACTS, FORMS

from .cases import CASES, LIBRARIES, Case
from .formulas import expected


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "form"), FACTS)
def test_positions_may_come_without_a_batch(name: str, form: str, library: str) -> None:
    case = CASES[2].in_library(library)
    alone = Case(*(value[0] for value in vars(case).values()))
    target, scale = case.target(name, form, {})
    target_alone, scale_alone = alone.target(name, form, {})

    np.testing.assert_array_equal(target_alone, target[0])
    np.testing.assert_array_equal(scale_alone, scale[0])


@pytest.mark.parametrize(
    ("name", "form", "model"),
    [(name, form, model) for (name, form), facts in FACTS.items() for model in facts.reads],
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


@pytest.mark.parametrize(("name", "form"), FACTS)
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
