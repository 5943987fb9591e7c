"""The sparse losses, written plainly: the reference for every faster path.

Cross-entropy to the target Q = γ·δ_y + (1 − γ)·residual, where the residual is known on a support S
and by its mass outside of it. The folder's `tail_shape` defines the shape of that tail:

- "student": everything outside S is one bucket. The loss is −Σ_S Q_k·log p_k − Q_tail·log p_tail
  with p_tail = 1 − Σ_S p_k, its gradient p − Q̂, where Q̂ gives the tail the student's own shape:
  right on S and on the total mass of the tail.
- "uniform": the tail's mass is spread evenly over the ids outside S. With S = {y} and a uniform
  residual this is label smoothing (arXiv 1512.00567), exactly.

N supervised positions, V vocabulary, S entries of the widest support, M positions with a tail.
Logits are taken to float32 at least; losses are in nats.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.batch import SparseTargets

TailShape = Literal["student", "uniform"]


def target_losses(logits_NV: Tensor, targets: SparseTargets, tail_shape: TailShape) -> Tensor:
    """The cross-entropy to the target at each position, [N], without its weight."""
    logits_NV = at_least_float32(logits_NV)
    is_observed_NS = targets.support_ids == targets.observed_ids[:, None]
    trusted_NS = targets.trust[:, None] * (is_observed_NS & targets.support_mask)
    residual_share_N = 1 - targets.trust
    target_NS = trusted_NS + residual_share_N[:, None] * targets.support_probs
    target_tail_N = residual_share_N * targets.tail_mass

    log_norm_N = logits_NV.logsumexp(1)
    log_probs_NS = logits_NV.gather(1, targets.support_ids) - log_norm_N[:, None]
    tail_log_probs_N = _tail_log_probs(logits_NV, log_norm_N, targets, target_tail_N, tail_shape)
    return -times(target_NS, log_probs_NS).sum(1) - times(target_tail_N, tail_log_probs_N)


def observed_losses(logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """−log p(y) at each position, [N]."""
    return cross_entropy(at_least_float32(logits_NV), targets.observed_ids, reduction="none")


def residual_divergences(logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """KL(residual ‖ student) at each position, [N], over the support and one bucket for the rest.

    A lower bound of the divergence over the whole vocabulary, equal to it where there is no tail.
    """
    logits_NV = at_least_float32(logits_NV)
    residual_NS, tail_N = targets.support_probs, targets.tail_mass
    log_norm_N = logits_NV.logsumexp(1)
    log_probs_NS = logits_NV.gather(1, targets.support_ids) - log_norm_N[:, None]
    tail_log_probs_N = _tail_log_probs(logits_NV, log_norm_N, targets, tail_N, "student")
    support_part_N = times(residual_NS, residual_NS.log() - log_probs_NS).sum(1)
    return support_part_N + times(tail_N, tail_N.log() - tail_log_probs_N)


def complement_log_probs(logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """The logsumexp over what is outside each position's support, −inf where nothing is, [N].

    It is summed over the complement; subtracting the support's share would cancel.
    """
    return logits_NV.scatter(1, targets.support_ids, -torch.inf).logsumexp(1)


def induced_target(
    loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, observed: Tensor
) -> Tensor:
    """The target that a loss induces at these logits: Q = p − ∂L/∂z, [..., V].

    The inversion of arXiv 2606.11189: any loss whose gradient is that of a cross-entropy to Q.
    `loss_fn(logits [..., V], observed [...])` returns the loss of each position, or their sum; it
    must detach what it treats as constant. The result has the logits' precision; its entries sum to
    1 if the loss does not change when a constant is added to all logits.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(leaf, observed).sum(), leaf)
    return leaf.detach().softmax(-1) - gradient


def _tail_log_probs(
    logits_NV: Tensor,
    log_norm_N: Tensor,
    targets: SparseTargets,
    mass_N: Tensor,
    tail_shape: TailShape,
) -> Tensor:
    """The log-probability that multiplies the tail's mass in the loss, 0 without a tail, [N].

    For "student" log(1 − Σ_S p), summed over the complement, as the subtraction would cancel; for
    "uniform" the mean of log p over the complement.
    """
    outside_N = logits_NV.shape[1] - targets.support_mask.sum(1)
    # rounding can leave 1e-8 of mass outside a support that is the whole vocabulary
    has_tail_N = (mass_N != 0) & (outside_N > 0)
    support_ids_MS = targets.support_ids[has_tail_N]
    complement_MV = logits_NV[has_tail_N]  # a copy, which can be overwritten
    match tail_shape:
        case "student":
            level_M = complement_MV.scatter_(1, support_ids_MS, -torch.inf).logsumexp(1)
        case "uniform":
            level_M = complement_MV.scatter_(1, support_ids_MS, 0).sum(1) / outside_N[has_tail_N]
    log_probs_N = torch.zeros_like(log_norm_N)
    log_probs_N[has_tail_N] = level_M - log_norm_N[has_tail_N]
    return log_probs_N


def times(probs: Tensor, values: Tensor) -> Tensor:
    """The product; 0 where the probability is 0, so 0·log 0 = 0."""
    return torch.where(probs != 0, probs * values, 0)


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32 at least, for sums over the vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
