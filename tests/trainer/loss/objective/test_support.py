"""Loss and gradient where a target is stored by its support and the mass of its tail."""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.tests.support import divergences
from qpipe.tests.support.methods import DEFAULTS, DIVERGENCES, FORMULAS, Token
from qpipe.trainer.data.batch import SparseTargets
from torch import Tensor

from .dense import Models, V, dense_loss
from .folders import loss_and_gradient, objective_for, random_models


@dataclass
class Truncated:
    """Random models with one of them known on random supports."""

    logits: Tensor
    models: Models
    targets: SparseTargets
    in_support: Tensor  # [N, V]


def truncate(seed: int, count: int, spread: float, residual: str, least: float = 0.0) -> Truncated:
    """Supports of 1 to V ids in any order, padded; a few known probabilities are the least."""
    logits, models = random_models(count, seed, spread)
    rng = np.random.default_rng(seed)
    known = getattr(models, residual).clone()
    known[torch.tensor(rng.random((count, V)) < rng.choice([0.0, 0.3]))] = least
    known[torch.arange(count), models.observed] += 1e-3
    known = known / known.sum(1, keepdim=True)
    models = replace(models, **{residual: known})
    sizes = torch.tensor(rng.choice([1, 2, 5, V // 2, V - 1, V], count))
    # the observed token first, then the padding after as many others as fit
    order = torch.tensor(rng.random((count, V)))
    order[torch.arange(count), models.observed] = -1
    ids_NV = order.argsort(1)
    mask_NV = torch.arange(V) < sizes[:, None]
    shuffled = torch.where(mask_NV, torch.tensor(rng.random((count, V))), 2.0).argsort(1)
    ids_NV = torch.where(mask_NV, ids_NV.gather(1, shuffled), models.observed[:, None])
    width = int(sizes.max())
    in_support = torch.zeros(count, V, dtype=torch.bool).scatter(1, ids_NV, True)
    ones = torch.ones(count).double()
    targets = SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=ones,
        weights=ones,
        support_ids=ids_NV[:, :width],
        support_mask=mask_NV[:, :width],
        support_probs=torch.where(mask_NV, known.gather(1, ids_NV), 0)[:, :width],
        tail_mass=torch.where(in_support, 0, known).sum(1),
    )
    assert torch.equal(in_support.sum(1), sizes)
    return Truncated(logits, models, targets, in_support)


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 6),
    eta=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.8, 1.0]) | st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_live_target_sft_on_a_support(seed: int, spread: float, eta: float) -> None:
    """100 positions at a time: Q̂ as derived, and its distance from the Q of the full teacher."""
    case = truncate(seed, 100, spread, "q")
    models, inside = case.models, case.in_support
    p, q, p_y = models.p, models.q, models.at_observed(models.p)
    objective = objective_for("target-sft", "live", {"eta": eta})
    loss, gradient = loss_and_gradient(objective, case.logits, case.targets)

    product = torch.where(inside, p ** (1 - eta) * q**eta, 0)
    p_tail, q_tail = (torch.where(inside, 0, probs).sum(1) for probs in (p, q))
    # the bucket is there while the support is not the whole vocabulary
    tail = torch.where(inside.all(1), 0, p_tail ** (1 - eta) * q_tail**eta)
    norm = product.sum(1) + tail
    tail_mass = tail / norm
    shape = torch.where(inside, 0, p) / p_tail.clamp(min=1e-300)[:, None]
    mixed = product / norm[:, None] + tail_mass[:, None] * shape
    target = p_y[:, None] * models.one_hot + (1 - p_y)[:, None] * mixed
    torch.testing.assert_close(gradient, p - target, rtol=1e-9, atol=1e-12)
    on_support = torch.where(inside, target * p.log(), 0).sum(1)
    in_tail = torch.where(tail_mass > 0, (1 - p_y) * tail_mass * p_tail.log(), 0)
    expected = -(on_support + in_tail).sum()
    torch.testing.assert_close(loss.sum.detach(), expected, rtol=1e-9, atol=1e-9)

    _, dense = dense_loss("target-sft", "live", {"eta": eta}, models)
    error = (gradient - dense).abs().sum(1)
    bound = 2 * (1 - p_y) * tail_mass
    assert (error <= bound + 1e-12).all()
    assert loss.error_bounds is not None
    torch.testing.assert_close(loss.error_bounds, bound, rtol=1e-9, atol=1e-12)
    if eta == 0:
        torch.testing.assert_close(gradient, dense, rtol=1e-9, atol=1e-12)  # dft


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 4),
    eta=st.floats(0, 1),
    alpha=st.sampled_from([-1.0, 0.0, 1.0, 3.0]) | st.floats(-1, 0.9),
)
@settings(max_examples=30, deadline=None)
def test_live_amid_is_exact_over_the_outcomes_and_within_its_bound(
    seed: int, spread: float, eta: float, alpha: float
) -> None:
    """100 positions at a time; the outcomes are the ids of the support, and all others as one."""
    parameters = {"eta": eta, "alpha": alpha}
    case = truncate(seed, 100, spread, "q", least=1e-30)
    objective = objective_for("amid", "live", parameters)
    loss, gradient = loss_and_gradient(objective, case.logits, case.targets)
    bounds, expected = [], torch.zeros_like(gradient)
    for n, inside in enumerate(case.in_support):
        p, q = case.models.p[n], case.models.q[n]
        outcomes = [[*probs[inside].tolist(), float(probs[~inside].sum())] for probs in (p, q)]
        logs = [[math.log(x) if x else -math.inf for x in probs] for probs in outcomes]
        token = Token(followed=logs[0], base=logs[0], teacher=logs[1], observed=0, mask=1.0)
        _, mixed, _ = FORMULAS["amid"](token, parameters)
        tail = 0.0 if inside.all() else mixed[-1]
        expected[n, inside] = p[inside] - torch.tensor(mixed[:-1], dtype=torch.float64)
        if tail or not inside.all():
            shape = p[~inside] / max(outcomes[0][-1], 1e-300)
            expected[n, ~inside] = p[~inside] - tail * shape
        bounds.append(2 * tail)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    bound = torch.tensor(bounds, dtype=torch.float64)
    torch.testing.assert_close(loss.error_bounds, bound, rtol=1e-8, atol=1e-12)
    _, dense = dense_loss("amid", "live", parameters, case.models)
    assert ((gradient - dense).abs().sum(1) <= bound + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 6), share=st.floats(0, 1))
@settings(max_examples=8, deadline=None)
def test_a_divergence_on_a_support(name: str, seed: int, spread: float, share: float) -> None:
    """100 positions at a time: exact over the outcomes, and within its bound of the whole."""
    parameters = {key: min(max(share, 1e-3), 0.999) for key in DEFAULTS[name]}
    case = truncate(seed, 100, spread, "q", least=1e-30)
    loss, gradient = loss_and_gradient(
        objective_for(name, "live", parameters), case.logits, case.targets
    )
    losses, expected, bounds = [], torch.zeros_like(gradient), []
    for n, inside in enumerate(case.in_support):
        p, q = case.models.p[n], case.models.q[n]
        tails = [float(probs[~inside].sum()) for probs in (p, q)]
        tail = [] if inside.all() else [math.log(mass) for mass in tails]
        logs = [[*probs[inside].log().tolist(), *tail[i:][:1]] for i, probs in enumerate((p, q))]
        losses.append(divergences.value(name, *logs, parameters))
        of_outcomes = divergences.gradient(name, *logs, parameters)
        expected[n, inside] = torch.tensor(of_outcomes[: int(inside.sum())], dtype=torch.float64)
        if tail:
            expected[n, ~inside] = of_outcomes[-1] * p[~inside] / tails[0]
        bounds.append(divergences.bound(name, *tails, parameters))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert loss.sum.item() == pytest.approx(math.fsum(losses), rel=1e-9, abs=1e-9)
    bound = torch.tensor(bounds, dtype=torch.float64)
    torch.testing.assert_close(loss.error_bounds, bound, rtol=1e-8, atol=1e-12)
    _, dense = dense_loss(name, "live", parameters, case.models)
    assert ((gradient - dense).abs().sum(1) <= bound + 1e-12).all()


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_bound_of_target_sft_can_be_reached(weight: float) -> None:
    """A teacher whose mass outside lies where the student has next to none: 2·(1 − p_y)·m̂."""
    p = torch.tensor([[0.1, 1e-9, 0.9 - 1e-9]]).double()
    q = torch.tensor([[0.1, 0.9 - 1e-9, 1e-9]]).double()
    one = torch.ones(1).double()
    targets = SparseTargets(
        *(torch.tensor([0]), torch.tensor([0]), one, weight * one),
        *(torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[0.1]]).double(), 0.9 * one),
    )
    objective = objective_for("target-sft", "live", {"eta": 0.5})
    loss, gradient = loss_and_gradient(objective, p.log(), targets)
    mixture = (p * q).sqrt() / (p * q).sqrt().sum()
    dense = weight * (p - 0.1 * torch.tensor([[1.0, 0, 0]]) - 0.9 * mixture)
    error = (gradient - dense).abs().sum()
    assert error.item() == pytest.approx(weight * 2 * 0.9 * 0.9, rel=1e-3)
    assert loss.error_bounds is not None
    assert loss.error_bounds.item() == pytest.approx(weight * 2 * 0.9 * 0.9)


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 6), lam=st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_live_asft_on_a_support(seed: int, spread: float, lam: float) -> None:
    """Right on the support and on the total of the tail, where it has the student's shape."""
    case = truncate(seed, 100, spread, "b")
    models, inside = case.models, case.in_support
    objective = objective_for("asft", "live", {"lam": lam})
    loss, gradient = loss_and_gradient(objective, case.logits, case.targets)
    _, dense = dense_loss("asft", "live", {"lam": lam}, models)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(torch.where(inside, gradient, 0), torch.where(inside, dense, 0))
    tail_gradient, dense_tail = (torch.where(inside, 0, g).sum(1) for g in (gradient, dense))
    close(tail_gradient, dense_tail)
    p_tail = torch.where(inside, 0, models.p).sum(1)
    shape = torch.where(inside, 0, models.p) / p_tail.clamp(min=1e-300)[:, None]
    close(torch.where(inside, 0, gradient), tail_gradient[:, None] * shape)

    # the cross-entropy to p_y·δ + lam·b over the support and the bucket
    weighted = models.at_observed(models.p)[:, None] * models.one_hot + lam * models.b
    on_support = torch.where(inside, weighted * models.p.log(), 0).sum(1)
    tail = torch.where(inside, 0, weighted).sum(1)
    in_tail = torch.where(tail > 0, tail * p_tail.log(), 0)
    torch.testing.assert_close(
        loss.sum.detach(), -(on_support + in_tail).sum(), rtol=1e-9, atol=1e-9
    )
