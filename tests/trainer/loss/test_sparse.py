"""The sparse losses against dense float64 arithmetic done here, in numpy.

N positions, V vocabulary, S support entries.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss.objective import objective_of
from qpipe.trainer.loss.sparse import (
    TailShape,
    complement_log_probs,
    observed_losses,
    residual_divergences,
    target_losses,
)

V = 23
TAIL_SHAPES: list[TailShape] = ["student", "uniform"]
ANCHORED = objective_of(
    {
        "method": "sft+kl",
        "form": "frozen-target",
        "parameters": {"lam": 0.1},
        "residual": "base",
        "tail_shape": "student",
    },
    "sft+kl",
)


@dataclass
class Position:
    """One position: the observed token, γ, the weight, the residual on its support, its tail."""

    observed: int
    trust: float
    weight: float
    ids: list[int]
    probs: list[float]
    tail: float


def random_position(rng: np.random.Generator, size: int, vocab_size: int = V) -> Position:
    ids = rng.permutation(vocab_size)[:size]
    mass = rng.dirichlet(np.ones(size + 1))
    if size == vocab_size:
        mass = np.append(mass[:-1] / mass[:-1].sum(), 0.0)
    return Position(
        observed=int(rng.choice(ids)),
        trust=float(rng.choice([0.0, 1.0, rng.random()])),
        weight=float(rng.uniform(0, 2)),
        ids=[int(i) for i in ids],
        probs=[float(p) for p in mass[:-1]],
        tail=float(mass[-1]),
    )


def sparse(positions: list[Position], dtype: torch.dtype = torch.float64) -> SparseTargets:
    """The padded tensors, laid out entry by entry."""
    width = max(len(position.ids) for position in positions)
    pad = [width - len(position.ids) for position in positions]
    rows = list(zip(positions, pad, strict=True))
    return SparseTargets(
        observed_ids=torch.tensor([p.observed for p in positions]),
        example_of=torch.zeros(len(positions), dtype=torch.int64),
        trust=torch.tensor([p.trust for p in positions], dtype=dtype),
        weights=torch.tensor([p.weight for p in positions], dtype=dtype),
        support_ids=torch.tensor([p.ids + [p.observed] * n for p, n in rows]),
        support_mask=torch.tensor([[True] * len(p.ids) + [False] * n for p, n in rows]),
        support_probs=torch.tensor([p.probs + [0.0] * n for p, n in rows], dtype=dtype),
        tail_mass=torch.tensor([p.tail for p in positions], dtype=dtype),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def dense_target(position: Position, logits: np.ndarray, tail_shape: TailShape) -> np.ndarray:
    """Q over the whole vocabulary; the tail spread as `tail_shape` says."""
    shape = softmax(logits) if tail_shape == "student" else np.ones(len(logits))
    shape = shape.copy()
    shape[position.ids] = 0
    residual = np.zeros(len(logits))
    residual[position.ids] = position.probs
    if shape.sum() > 0:
        residual += position.tail * shape / shape.sum()
    target = (1 - position.trust) * residual
    target[position.observed] += position.trust
    return target


def dense_loss(position: Position, logits: np.ndarray, tail_shape: TailShape) -> float:
    """Cross-entropy term by term; for "student" with the tail as one more outcome."""
    p = softmax(logits)
    if tail_shape == "uniform":
        return float(-(dense_target(position, logits, tail_shape) * np.log(p)).sum())
    on_support = dense_target(position, logits, "student")[position.ids]
    tail = (1 - position.trust) * position.tail
    outside = np.delete(p, position.ids).sum()
    tail_part = tail * np.log(outside) if tail > 0 else 0.0
    return float(-(on_support * np.log(p[position.ids])).sum() - tail_part)


def losses_and_gradient(
    logits_NV: np.ndarray, positions: list[Position], tail_shape: TailShape
) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.tensor(logits_NV, requires_grad=True)
    losses = target_losses(logits, sparse(positions), tail_shape)
    losses.sum().backward()
    assert logits.grad is not None
    return losses.detach().numpy(), logits.grad.numpy()


@pytest.mark.parametrize("tail_shape", TAIL_SHAPES)
def test_full_support_equals_the_dense_cross_entropy(tail_shape: TailShape) -> None:
    rng = np.random.default_rng(1)
    positions = [random_position(rng, V) for _ in range(40)]
    logits_NV = rng.normal(0, 4, (40, V))
    losses, gradient = losses_and_gradient(logits_NV, positions, tail_shape)
    for n, position in enumerate(positions):
        target = dense_target(position, logits_NV[n], tail_shape)
        p = softmax(logits_NV[n])
        assert losses[n] == pytest.approx(-(target * np.log(p)).sum(), abs=1e-10)
        np.testing.assert_allclose(gradient[n], p - target, atol=1e-10)


@given(
    sizes=st.lists(st.integers(1, V), min_size=1, max_size=6),
    spread=st.floats(0, 10),
    tail_shape=st.sampled_from(TAIL_SHAPES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_support(sizes: list[int], spread: float, tail_shape: TailShape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = [random_position(rng, size) for size in sizes]
    logits_NV = rng.normal(0, spread, (len(sizes), V))
    losses, gradient = losses_and_gradient(logits_NV, positions, tail_shape)
    for n, position in enumerate(positions):
        target = dense_target(position, logits_NV[n], tail_shape)
        assert losses[n] == pytest.approx(dense_loss(position, logits_NV[n], tail_shape), abs=1e-9)
        np.testing.assert_allclose(gradient[n], softmax(logits_NV[n]) - target, atol=1e-10)


@pytest.mark.parametrize("tail_shape", TAIL_SHAPES)
def test_gradient_by_finite_differences(tail_shape: TailShape) -> None:
    rng = np.random.default_rng(2)
    positions = [random_position(rng, size) for size in (1, 3, 7, V)]
    logits_NV = torch.tensor(rng.normal(0, 2, (4, V)), requires_grad=True)
    targets = sparse(positions)
    assert torch.autograd.gradcheck(lambda z: target_losses(z, targets, tail_shape), logits_NV)


def test_uniform_tail_on_the_observed_token_is_label_smoothing() -> None:
    rng = np.random.default_rng(3)
    positions = [Position(y, 0.9, 1.0, [y], [1 / V], 1 - 1 / V) for y in (0, 5, V - 1)]
    logits_NV = torch.tensor(rng.normal(0, 3, (3, V)))
    expected = torch.nn.functional.cross_entropy(
        logits_NV, torch.tensor([0, 5, V - 1]), label_smoothing=0.1, reduction="none"
    )
    found = target_losses(logits_NV, sparse(positions), "uniform")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_full_trust_is_the_negative_log_likelihood() -> None:
    rng = np.random.default_rng(4)
    positions = [replace(random_position(rng, 4), trust=1.0) for _ in range(10)]
    logits_NV = torch.tensor(rng.normal(0, 3, (10, V)))
    expected = [
        -np.log(softmax(z.numpy())[p.observed]) for z, p in zip(logits_NV, positions, strict=True)
    ]
    targets = sparse(positions)
    for found in (
        target_losses(logits_NV, targets, "student"),
        observed_losses(logits_NV, targets),
    ):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("tail", [0.0, 1e-8])
@pytest.mark.parametrize("tail_shape", TAIL_SHAPES)
def test_nothing_outside_the_support(tail: float, tail_shape: TailShape) -> None:
    """A support that is the whole vocabulary, with rounding dust left in the tail."""
    probs = [1 / V] * V
    position = Position(2, 0.3, 1.0, list(range(V)), probs, tail)
    logits_NV = np.random.default_rng(5).normal(0, 3, (1, V))
    losses, gradient = losses_and_gradient(logits_NV, [position], tail_shape)
    without_dust = replace(position, tail=0.0)
    assert losses[0] == pytest.approx(dense_loss(without_dust, logits_NV[0], tail_shape), abs=1e-6)
    assert np.isfinite(gradient).all()


def test_zero_probabilities_meet_infinite_logits() -> None:
    """0·log 0 = 0, in the loss, the divergence and the gradient."""
    position = Position(0, 0.5, 1.0, [0, 1, 2], [0.75, 0.25, 0.0], 0.0)
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, -torch.inf]], requires_grad=True)
    targets = sparse([position, replace(position, ids=[0, 1, 3])])
    logits_NV = logits.expand(2, 5)
    loss = target_losses(logits_NV.double(), targets, "student")
    np.testing.assert_allclose(loss.detach().numpy(), [np.log(3)] * 2, atol=1e-7)
    loss.sum().backward()
    # 2·(p − Q) with p = 1/3 on ids 0, 1 and 3
    expected = 2 * np.array([1 / 3 - 0.875, 1 / 3 - 0.125, 0, 1 / 3, 0])
    np.testing.assert_allclose(logits.grad.numpy()[0], expected, atol=1e-6)  # type: ignore
    divergence = residual_divergences(logits_NV.double(), targets).detach().numpy()
    by_hand = 0.75 * np.log(0.75) + 0.25 * np.log(0.25) + np.log(3)
    np.testing.assert_allclose(divergence, [by_hand] * 2, atol=1e-7)


def test_a_tail_that_the_student_hardly_sees() -> None:
    """log(1 − Σ_S p) is −40 + log 3, where the float32 subtraction would give log 0."""
    logits_NV = torch.tensor([[40.0, 0.0, 0.0, 0.0]]) - 300
    position = Position(0, 0.0, 1.0, [0], [0.5], 0.5)
    loss = target_losses(logits_NV, sparse([position], torch.float32), "student")
    assert loss.item() == pytest.approx(0.5 * (40 - np.log(3)), rel=1e-5)


def test_complement_is_what_is_outside_of_each_support() -> None:
    rng = np.random.default_rng(10)
    positions = [random_position(rng, size) for size in (1, 4, V - 1)]
    logits_NV = rng.normal(0, 3, (3, V))
    found = complement_log_probs(torch.tensor(logits_NV), sparse(positions))
    for n, position in enumerate(positions):
        outside = np.delete(logits_NV[n], position.ids)
        assert found[n].item() == pytest.approx(np.log(np.exp(outside).sum()), abs=1e-12)
    whole = sparse([random_position(rng, V)])
    assert complement_log_probs(torch.tensor(logits_NV[:1]), whole).tolist() == [-np.inf]
    far = complement_log_probs(
        torch.tensor([[40.0, 0.0, 0.0]]), sparse([Position(0, 1, 1, [0], [1], 0)])
    )
    assert far.item() == pytest.approx(np.log(2))  # not the −inf of a float32 subtraction


def test_bfloat16_logits_are_summed_in_float32() -> None:
    rng = np.random.default_rng(6)
    vocab_size = 5000
    positions = [random_position(rng, 8, vocab_size) for _ in range(20)]
    rounded = torch.tensor(rng.normal(0, 3, (20, vocab_size))).bfloat16()
    found = target_losses(rounded, sparse(positions, torch.float32), "student")
    expected = [
        dense_loss(p, z.double().numpy(), "student")
        for p, z in zip(positions, rounded, strict=True)
    ]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)


def test_a_frozen_objective_weighs_and_adds() -> None:
    rng = np.random.default_rng(7)
    positions = [random_position(rng, 4) for _ in range(9)]
    logits_NV = rng.normal(0, 3, (9, V))
    expected = sum(
        p.weight * dense_loss(p, z, "student") for p, z in zip(positions, logits_NV, strict=True)
    )
    found = ANCHORED(torch.tensor(logits_NV), sparse(positions))
    assert found.sum.item() == pytest.approx(expected, abs=1e-10)
    assert found.error_bounds is None


def test_no_positions_give_a_zero_with_a_gradient() -> None:
    logits_NV = torch.zeros(0, V, requires_grad=True)
    empty = SparseTargets(
        *(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
        *(torch.zeros(0), torch.zeros(0)),
        *(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool)),
        *(torch.zeros(0, 1), torch.zeros(0)),
    )
    loss = ANCHORED(logits_NV, empty).sum
    loss.backward()
    assert loss.item() == 0
    assert logits_NV.grad is not None


def test_divergence_of_a_full_support_is_the_dense_one() -> None:
    rng = np.random.default_rng(8)
    positions = [random_position(rng, V) for _ in range(10)]
    logits_NV = rng.normal(0, 3, (10, V))
    found = residual_divergences(torch.tensor(logits_NV), sparse(positions)).numpy()
    for n, position in enumerate(positions):
        residual = np.array(position.probs)
        p = softmax(logits_NV[n])[position.ids]
        assert found[n] == pytest.approx((residual * np.log(residual / p)).sum(), abs=1e-10)


def test_divergence_takes_the_tail_as_one_outcome() -> None:
    position = Position(1, 0.7, 1.0, [1, 3], [0.5, 0.2], 0.3)
    p = np.array([0.1, 0.4, 0.2, 0.25, 0.05])
    by_hand = 0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.25) + 0.3 * np.log(0.3 / 0.35)
    found = residual_divergences(torch.tensor(np.log(p)[None]), sparse([position]))
    assert found.item() == pytest.approx(by_hand, abs=1e-12)


def test_divergence_from_itself_is_zero() -> None:
    logits = np.random.default_rng(9).normal(0, 3, V)
    p = softmax(logits)
    ids = [4, 0, 11]
    position = Position(0, 0.9, 1.0, ids, [float(p[i]) for i in ids], float(1 - p[ids].sum()))
    found = residual_divergences(torch.tensor(logits[None]), sparse([position]))
    assert found.item() == pytest.approx(0, abs=1e-12)
