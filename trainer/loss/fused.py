"""The output head, its log-sum-exp and the sparse cross-entropy in one, a few rows at a time.

The logits of a chunk of supervised positions are computed, turned into their gradient in place,
multiplied back into the gradients of the hidden states and of the head, and forgotten: the full
[N, V] never exists. Value and gradient are those of `objective`, the plain reference.

With q the target on a support S, m its mass in all and q_t its tail's, p the student, C what is
outside of S, the gradient with respect to the logits is

    m·p_k − q_k on S,   (m·p_C − q_t)·p_k/p_C on C        (tail shape "student")
    m·p_k − q_k on S,   m·p_k − q_t/|C| on C              (tail shape "uniform")

C is summed without S, so nothing cancels where p_C is tiny.

N supervised positions, n those of a chunk, D hidden size, V vocabulary, S widest support.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...pipeline.methods import rules
from ..data.batch import SparseTargets
from .objective import (
    Loss,
    Objective,
    example_means,
    live_targets,
    matching_losses,
    stored_log_prob,
)
from .sparse import observed_losses, times

_CHUNK_VALUES = 2**24  # logits at once: 64 MiB in float32
_TIMES_ON_GPU = 4  # as many: fewer leave an H100 idle, 2.8 times as slow, and save no memory there


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """An output head: the logits are softcap·tanh(z/softcap) of z = scale·(W·h + bias)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """The logits [n, V], in float32 at least."""
        logits_nV = torch.nn.functional.linear(hidden_nD, self.weight, self.bias)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        if self.scale != 1:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV

    def into_scores(self, gradient_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """The gradient with respect to W·h + bias, from that with respect to the logits."""
        if self.softcap is not None:
            gradient_nV = gradient_nV * (1 - (logits_nV / self.softcap).square())
        return gradient_nV if self.scale == 1 else gradient_nV * self.scale


def fused_loss(hidden_ND: Tensor, head: Head, targets: SparseTargets, objective: Objective) -> Loss:
    """Σ weight·loss over the positions whose hidden states are given."""
    ratios_N = _sequence_log_ratios(hidden_ND, head, targets, objective)
    total, bounds_N = _FusedLoss.apply(
        hidden_ND, head.weight, head.bias, head, targets, objective, ratios_N
    )
    return Loss(total, bounds_N if objective.has_error_bounds else None)


def chunks(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows whose logits are few enough to be held at once; no rows are one chunk."""
    values = _CHUNK_VALUES * (1 if device.type == "cpu" else _TIMES_ON_GPU)
    size = max(1, values // vocab_size)
    return (slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size))


def rows_of(targets: SparseTargets, rows: slice) -> SparseTargets:
    """The targets of some positions."""
    return SparseTargets(*(getattr(targets, field.name)[rows] for field in fields(targets)))


class _FusedLoss(torch.autograd.Function):
    """Computes its gradients with its value; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        targets: SparseTargets,
        objective: Objective,
        ratios_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # what is added up over the chunks stays in float32; sums of bfloat16 would lose the small
        add_up = torch.promote_types(weight_VD.dtype, torch.float32)
        total = hidden_ND.new_zeros((), dtype=add_up)
        bounds_N = hidden_ND.new_zeros(len(hidden_ND), dtype=add_up)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = None
        grad_bias = weight_VD.new_zeros(len(weight_VD), dtype=add_up) if needs_bias else None
        cast = replace(head, weight=weight_VD.to(hidden_ND.dtype), bias=_like(bias_V, hidden_ND))

        for rows in chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
            hidden_nD = hidden_ND[rows]
            logits_nV = cast.logits(hidden_nD)
            chunk = rows_of(targets, rows)
            capped_nV = logits_nV.clone() if head.softcap is not None else logits_nV
            ratios_n = None if ratios_N is None else ratios_N[rows]
            loss, bounds_N[rows], gradient_nV = _loss_and_gradient(
                logits_nV, chunk, objective, ratios_n
            )
            total = total + loss  # in place, torch 2.11's compiler loses its gradient
            scores_nV = head.into_scores(gradient_nV, capped_nV)
            if grad_bias is not None:
                grad_bias += scores_nV.sum(0)
            scores_nV = scores_nV.to(hidden_nD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = scores_nV @ cast.weight
            if needs_weight:
                grad_weight = _plus_product(grad_weight, scores_nV.T, hidden_nD, add_up)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(bounds_N)
        return total, bounds_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if weight is None else weight.mul_(scale).to(ctx.weight_dtype),
            None if bias is None else bias.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def _loss_and_gradient(
    logits_nV: Tensor, targets: SparseTargets, objective: Objective, ratios_n: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Σ weight·loss, the error bounds [n], and the gradient [n, V], in the place of the logits."""
    choice = objective.choice
    if choice.reads_student and choice.residual == "gem":
        return _matching(logits_nV, targets, objective)
    bounds: Tensor | float = 0.0
    if choice.reads_student:
        targets, live_bounds = live_targets(choice, logits_nV, targets, ratios_n)
        bounds = 0.0 if live_bounds is None else live_bounds
    total, gradient_nV = _sparse(logits_nV, targets, objective.tail_shape)
    return total, bounds, gradient_nV


def _sparse(logits_nV: Tensor, targets: SparseTargets, tail_shape: str) -> tuple[Tensor, Tensor]:
    """Σ weight·loss and its gradient, the logits overwritten."""
    ids, mask = targets.support_ids, targets.support_mask
    is_observed_nS = (ids == targets.observed_ids[:, None]) & mask
    share_n = 1 - targets.trust
    target_nS = targets.trust[:, None] * is_observed_nS + share_n[:, None] * targets.support_probs
    outside_n = logits_nV.shape[1] - mask.sum(1)
    # rounding can leave 1e-8 of mass outside a support that is the whole vocabulary
    tail_n = torch.where(outside_n > 0, share_n * targets.tail_mass, 0)
    mass_n = target_nS.sum(1) + tail_n
    weights_n = targets.weights

    support_nS = torch.where(mask, logits_nV.gather(1, ids), -torch.inf)
    level_n = logits_nV.scatter_(1, ids, 0).sum(1) / outside_n if tail_shape == "uniform" else None
    # one pass of exp for both the sum and the gradient
    top_n = _finite(logits_nV.scatter_(1, ids, -torch.inf).amax(1))
    scaled_nV = logits_nV.sub_(top_n[:, None]).exp_()
    sum_n = scaled_nV.sum(1)
    outside_norm_n = top_n + sum_n.log()
    log_norm_n = torch.logaddexp(outside_norm_n, support_nS.logsumexp(1))
    log_probs_nS = support_nS - log_norm_n[:, None]
    tail_log_probs_n = (outside_norm_n if level_n is None else level_n) - log_norm_n
    losses_n = -times(target_nS, log_probs_nS).sum(1) - times(tail_n, tail_log_probs_n)

    if level_n is None:
        # each share of the tail, times what the tail as a whole has too much
        excess_n = mass_n * tail_log_probs_n.exp() - tail_n
        factor_n = torch.where(sum_n > 0, weights_n * excess_n / sum_n, 0)
        gradient_nV = scaled_nV.mul_(factor_n[:, None])
    else:
        factor_n = weights_n * mass_n * (top_n - log_norm_n).exp()
        gradient_nV = scaled_nV.mul_(factor_n[:, None])
        gradient_nV.sub_((weights_n * tail_n / outside_n.clamp(min=1))[:, None])
        gradient_nV.scatter_(1, ids, 0)
    on_support_nS = weights_n[:, None] * (mass_n[:, None] * log_probs_nS.exp() - target_nS)
    gradient_nV.scatter_add_(1, ids, torch.where(mask, on_support_nS, 0).to(gradient_nV.dtype))
    return (weights_n * losses_n).sum(), gradient_nV


def _matching(
    logits_nV: Tensor, targets: SparseTargets, objective: Objective
) -> tuple[Tensor, float, Tensor]:
    """gem's Σ weight·loss and its gradient."""
    losses_n = matching_losses(logits_nV, targets.observed_ids, objective.choice)
    vocabulary = torch.arange(logits_nV.shape[1], device=logits_nV.device)
    is_observed_nV = vocabulary == targets.observed_ids[:, None]
    log_probs_nV = logits_nV.log_softmax(1)
    parameters = objective.choice.parameters
    gradient_nV = rules.matching_gradient(log_probs_nV, is_observed_nV, **parameters)
    return (targets.weights * losses_n).sum(), 0.0, targets.weights[:, None] * gradient_nV


@torch.no_grad()
def _sequence_log_ratios(
    hidden_ND: Tensor, head: Head, targets: SparseTargets, objective: Objective
) -> Tensor | None:
    """Each position's mean of log p_y − log b_y over its example, [N], where the method reads it.

    It takes all positions of an example, which chunks may tear apart: a pass of its own.
    """
    if not objective.reads_examples:
        return None
    losses = [
        observed_losses(head.logits(hidden_ND[rows]), rows_of(targets, rows))
        for rows in chunks(len(hidden_ND), len(head.weight), hidden_ND.device)
    ]
    return example_means(-torch.cat(losses) - stored_log_prob(targets), targets.example_of)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum with a matrix product added, in place and without room for it where the types allow.

    Under autocast not in place: it leaves that alone, in float32, which is many times slower.
    """
    if total is None:
        return (left @ right).to(dtype)
    is_plain = not torch.is_autocast_enabled(left.device.type)
    if is_plain and total.dtype == left.dtype == right.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _finite(values: Tensor) -> Tensor:
    return torch.where(values > -torch.inf, values, 0)


def _like(bias: Tensor | None, other: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(other.dtype)
