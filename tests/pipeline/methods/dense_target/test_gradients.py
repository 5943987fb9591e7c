"""Dense targets against the gradients of the published losses, and against each other's."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from qpipe.pipeline.methods import dense_target
from qpipe.tests.support.methods import DEFAULTS, FORMS, VARIANTS, Parameters

from .cases import CASES
from .losses import LOSSES, Losses


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
