"""Narrow, extreme and infinite logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from qpipe.trainer.data.batch import SparseTargets
from torch import Tensor

from .dense import V, dense_loss
from .folders import (
    CASES,
    folder_targets,
    loss_and_gradient,
    objective_for,
    over,
    random_models,
    to_dtype,
)


@over(CASES)
def test_narrow_logits_come_close_to_float64(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    """Only the logits are narrow: what is done with them is done in float32."""
    logits, models = random_models(seed=5)
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-4)):
        narrow = logits.to(dtype)
        loss, gradient = loss_and_gradient(objective, narrow, to_dtype(targets, torch.float32))
        exact, exact_gradient = loss_and_gradient(objective, narrow.double(), targets)
        assert loss.sum.dtype == torch.float32
        assert gradient.dtype == dtype
        assert loss.sum.item() == pytest.approx(exact.sum.item(), rel=1e-5)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=1e-5)


@over(CASES)
def test_extreme_logits_give_no_nan(name: str, form: str, parameters: dict[str, Any]) -> None:
    """Probabilities that are 0 or 1 to rounding: of the observed token, and of the others."""
    _, models = random_models(count=6, seed=6)
    logits = torch.zeros(6, V).double()
    rows = torch.arange(6)
    other = (models.observed + 1) % V
    logits[0, models.observed[0]] = 1e4
    logits[1, models.observed[1]] = -1e4
    logits[2, other[2]] = 1e4
    logits[3] = torch.where(rows[3] + torch.arange(V) % 2 == 3, 1e4, -1e4)
    logits[4] += 1e4
    logits[5] -= 1e4
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        narrow = to_dtype(targets, torch.promote_types(dtype, torch.float32))
        loss, gradient = loss_and_gradient(objective, logits.to(dtype), narrow)
        assert loss.sum.isfinite(), dtype
        assert gradient.isfinite().all(), dtype


_MASKED = [case for case in CASES if case[0] != "label-smoothing"]  # which is infinite there


@over(_MASKED)
def test_tokens_that_the_student_rules_out(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    """Logits of −∞ outside the support, as of an embedding that is padded: as if they were not."""
    logits, models = random_models(seed=7)
    ruled_out = torch.rand(logits.shape) < 0.3
    ruled_out[torch.arange(len(logits)), models.observed] = False
    logits = logits.masked_fill(ruled_out, -torch.inf)
    models = replace(models, p=logits.softmax(1))
    for residual in ("b", "q"):
        probs = getattr(models, residual).masked_fill(ruled_out, 0)
        models = replace(models, **{residual: probs / probs.sum(1, keepdim=True)})
    # the reference knows no 0·log 0: the dense one of finite logits, far down
    far_down = logits.masked_fill(ruled_out, -200.0 + logits.amax())
    tiny = replace(
        models,
        p=far_down.softmax(1),
        b=torch.where(ruled_out, 1e-90, models.b),
        q=torch.where(ruled_out, 1e-90, models.q),
    )
    losses, expected = dense_loss(name, form, parameters, tiny)
    targets = with_holes(folder_targets(name, form, parameters, tiny), ruled_out)
    loss, gradient = loss_and_gradient(objective_for(name, form, parameters), logits, targets)
    torch.testing.assert_close(loss.sum.detach(), losses.sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    narrow, its_gradient = loss_and_gradient(
        objective_for(name, form, parameters), logits.bfloat16(), to_dtype(targets, torch.float32)
    )
    assert narrow.sum.isfinite()
    assert its_gradient.isfinite().all()


def with_holes(targets: SparseTargets, ruled_out: Tensor) -> SparseTargets:
    """The targets with these tokens out of the support; they had no mass."""
    if targets.support_ids.shape[1] == 1:
        return targets
    is_out = ruled_out.gather(1, targets.support_ids)
    return replace(
        targets,
        support_mask=~is_out,
        support_ids=torch.where(is_out, targets.observed_ids[:, None], targets.support_ids),
        support_probs=torch.where(is_out, 0, targets.support_probs),
    )
