"""The target that a loss induces, of the papers' losses and of the objectives themselves."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qpipe.trainer.loss.sparse import induced_target
from torch import Tensor
from torch.nn.functional import kl_div, one_hot

from .dense import EXACT, V, dense_loss
from .folders import LIVE_CASES, folder_targets, objective_for, over, random_models

LossFn = Callable[[Tensor, Tensor], Tensor]


def log_p_y(logits: Tensor, observed: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, observed[..., None])[..., 0]


def sft_loss(logits: Tensor, observed: Tensor) -> Tensor:
    return -log_p_y(logits, observed)


def dft_loss(logits: Tensor, observed: Tensor) -> Tensor:
    nll = -log_p_y(logits, observed)
    return torch.exp(-nll).detach() * nll


def beyond_log_loss(logits: Tensor, observed: Tensor) -> Tensor:
    """As in the paper: not detached."""
    return (1 - log_p_y(logits, observed).exp() ** 3) / 3


def gem_loss(logits: Tensor, observed: Tensor) -> Tensor:
    pull = (logits / 0.7).softmax(-1).detach()
    return (pull * (logits - logits.gather(-1, observed[..., None]))).sum(-1)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
@pytest.mark.parametrize("reduce", [False, True])
def test_induced_targets_are_those_of_the_table(shape: tuple[int, ...], reduce: bool) -> None:
    logits_NV, models = random_models(math.prod(shape), seed=8)
    logits, observed = logits_NV.reshape(*shape, V), models.observed.reshape(shape)
    b, q = models.b.reshape(*shape, V), models.q.reshape(*shape, V)

    def asft_loss(logits: Tensor, observed: Tensor) -> Tensor:
        """As in the paper: dft and 0.1·KL(b ‖ p)."""
        divergence = kl_div(logits.log_softmax(-1), b, reduction="none").sum(-1)
        return dft_loss(logits, observed) + 0.1 * divergence

    def kd_loss(logits: Tensor, observed: Tensor) -> Tensor:
        return -(q * logits.log_softmax(-1)).sum(-1)

    def target_sft_loss(logits: Tensor, observed: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        p = log_probs.exp().detach()
        mixture = (p * q).sqrt() / (p * q).sqrt().sum(-1, keepdim=True)
        p_y = p.gather(-1, observed[..., None])
        target = p_y * one_hot(observed, V) + (1 - p_y) * mixture
        return -(target * log_probs).sum(-1)

    expected: list[tuple[LossFn, str, dict[str, Any]]] = [
        (sft_loss, "sft", {}),
        (dft_loss, "dft", {}),
        (beyond_log_loss, "beyond-log", {"alpha": 3.0}),
        (gem_loss, "gem", {"beta": 0.7, "h": "linear"}),
        (asft_loss, "asft", {"lam": 0.1}),
        (kd_loss, "kd", {}),
        (target_sft_loss, "target-sft", {"eta": 0.5}),
    ]
    for own, name, parameters in expected:
        loss_fn = (lambda z, y, own=own: own(z, y).sum()) if reduce else own
        found = induced_target(loss_fn, logits, observed)
        _, gradient = dense_loss(name, "live", parameters, models)
        assert found.shape == logits.shape
        assert not found.requires_grad
        torch.testing.assert_close(found.sum(-1), torch.ones(shape).double(), **EXACT)
        torch.testing.assert_close(found.reshape(-1, V), models.p - gradient, **EXACT)
    sft = induced_target(sft_loss, logits, observed)
    torch.testing.assert_close(sft, one_hot(observed, V).double(), rtol=0, atol=1e-12)
    assert logits.grad is None
    assert not logits.requires_grad


@over(LIVE_CASES)
def test_the_objectives_themselves_induce_their_targets(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits, models = random_models(seed=9)
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    found = induced_target(lambda z, _: objective(z, targets).sum, logits, models.observed)
    _, gradient = dense_loss(name, form, parameters, models)
    torch.testing.assert_close(found, models.p - gradient, **EXACT)


def test_induced_target_ignores_a_gradient_that_waits() -> None:
    """Of a leaf in training neither its gradient nor its graph is touched."""
    logits = torch.randn(3, V, requires_grad=True)
    with torch.no_grad():
        outside = logits.clone()
    observed = torch.tensor([0, 1, 2])
    found = induced_target(sft_loss, logits, observed)
    assert logits.grad is None
    assert torch.equal(found, induced_target(sft_loss, outside, observed))
    assert found.dtype == torch.float32
