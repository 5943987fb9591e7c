"""The output head, its log-sum-exp and the sparse cross-entropy in one, a few rows at a time.

The logits of a chunk of supervised positions are computed, turned into their gradient in place,
multiplied back into the gradients of the hidden states and of the head, and freed: the full [N, V]
never exists. Value and gradient are those of `objective`, the plain reference.

With q the target on a support S, m its total mass, q_t the mass of its tail, p the student, C the
complement of S, the gradient with respect to the logits is

    m·p_k − q_k on S,   (m·p_C − q_t)·p_k/p_C on C        (tail shape "student")
    m·p_k − q_k on S,   m·p_k − q_t/|C| on C              (tail shape "uniform")

C is summed without S, so nothing cancels where p_C is tiny.

N supervised positions, n those of a chunk, D hidden size, V vocabulary, S widest support.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...pipeline.methods import rules
from ...pipeline.methods.definition import Choice
from ..data.batch import SparseTargets
from .head import Head, chunks
from .objective import (
    Loss,
    Objective,
    example_means,
    live_targets,
    matching_losses,
    stored_log_prob,
)
from .sparse import TailShape, observed_losses, times


def sparse_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    observed_ids: Tensor,
    support_ids: Tensor,
    support_probs: Tensor,
    tail_mass: Tensor,
    trust: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tail: TailShape = "student",
) -> Tensor:
    """Σ weights·CE(Q, p) in nats over N positions, a scalar; the [N, V] logits never exist.

    The target is Q = trust·δ_observed + (1 − trust)·residual. The residual is `support_probs` on a
    support of at most S ids, and `tail_mass` in all outside of it; `tail` is the shape of that
    tail, the student's own or uniform (`qpipe.trainer.loss.sparse`). The student is p =
    softmax(softcap·tanh(z/softcap)) of z = scale·(weight·hidden + bias). Gradients reach `hidden`,
    `weight` and `bias`.

    Args:
        hidden: [N, D], the states before the output head, of supervised positions only.
        weight: [V, D], the output head.
        observed_ids: [N] int64.
        support_ids: [N, S] int64, distinct within a row, the observed id among them. A row with
            fewer than S ids is padded with -1; for a list of rows,
            `torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)` pads.
        support_probs: [N, S], ignored where the id is -1.
        tail_mass: [N], 1 − Σ support_probs.
        trust: [N], γ, 0 to 1.
        weights: [N], of each position's loss; divide by the number of tokens for a mean.
        bias: [V].
        scale: A factor of the scores.
        softcap: A bound of the logits; None leaves them unbounded.
        tail: "student" or "uniform".

    Raises ValueError where a row lacks its observed id.
    """
    is_entry_NS = support_ids >= 0
    if not ((support_ids == observed_ids[:, None]).any(1)).all():
        raise ValueError("the observed id of every row must be among its support_ids")
    targets = SparseTargets(
        observed_ids=observed_ids,
        example_of=torch.zeros_like(observed_ids),
        trust=trust,
        weights=weights,
        support_ids=torch.where(is_entry_NS, support_ids, observed_ids[:, None]),
        support_mask=is_entry_NS,
        support_probs=torch.where(is_entry_NS, support_probs, 0),
        tail_mass=tail_mass,
    )
    head = Head(weight, bias, scale, softcap)
    return _FusedLoss.apply(hidden, weight, bias, head, targets, tail, None, None)[0]


def fused_loss(hidden_ND: Tensor, head: Head, targets: SparseTargets, objective: Objective) -> Loss:
    """Σ weight·loss over the positions whose hidden states are given."""
    live = objective.choice if objective.choice.reads_student else None
    ratios_N = _sequence_log_ratios(hidden_ND, head, targets, objective)
    total, bounds_N = _FusedLoss.apply(
        hidden_ND, head.weight, head.bias, head, targets, objective.tail_shape, live, ratios_N
    )
    return Loss(total, bounds_N if objective.has_error_bounds else None)


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
        tail_shape: TailShape,
        live: Choice | None,
        ratios_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # sums over the chunks are float32; in bfloat16 they would lose small terms
        add_up = torch.promote_types(weight_VD.dtype, torch.float32)
        total = hidden_ND.new_zeros((), dtype=add_up)
        bounds_N = hidden_ND.new_zeros(len(hidden_ND), dtype=add_up)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = None
        grad_bias = weight_VD.new_zeros(len(weight_VD), dtype=add_up) if needs_bias else None
        dtype = hidden_ND.dtype
        bias = None if bias_V is None else bias_V.to(dtype)
        cast = replace(head, weight=weight_VD.to(dtype), bias=bias)

        for rows in chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
            hidden_nD = hidden_ND[rows]
            logits_nV = cast.logits(hidden_nD)
            chunk = rows_of(targets, rows)
            capped_nV = logits_nV.clone() if head.softcap is not None else logits_nV
            ratios_n = None if ratios_N is None else ratios_N[rows]
            loss, bounds_N[rows], gradient_nV = _loss_and_gradient(
                logits_nV, chunk, tail_shape, live, ratios_n
            )
            total = total + loss  # in place, torch 2.11's compiler loses its gradient
            scores_nV = head.into_scores(gradient_nV, capped_nV)
            if grad_bias is not None:
                grad_bias += scores_nV.sum(0)
            scores_nV = scores_nV.to(hidden_nD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = scores_nV @ cast.weight
            if needs_weight:
                grad_weight = add_product(grad_weight, scores_nV.T, hidden_nD, add_up)
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
            *[None] * 5,
        )


def _loss_and_gradient(
    logits_nV: Tensor,
    targets: SparseTargets,
    tail_shape: TailShape,
    live: Choice | None,
    ratios_n: Tensor | None,
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Σ weight·loss, the error bounds [n], and the gradient [n, V], in the place of the logits.

    `live` is the method if its targets depend on the student.
    """
    if live is not None and live.residual == "gem":
        return _matching(logits_nV, targets, live)
    bounds = None
    if live is not None:
        targets, bounds = live_targets(live, logits_nV, targets, ratios_n)
    total, gradient_nV = _sparse(logits_nV, targets, tail_shape)
    return total, 0.0 if bounds is None else bounds, gradient_nV


def _sparse(
    logits_nV: Tensor, targets: SparseTargets, tail_shape: TailShape
) -> tuple[Tensor, Tensor]:
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
    top_n = logits_nV.scatter_(1, ids, -torch.inf).amax(1)
    top_n = torch.where(top_n > -torch.inf, top_n, 0)
    scaled_nV = logits_nV.sub_(top_n[:, None]).exp_()
    sum_n = scaled_nV.sum(1)
    outside_norm_n = top_n + sum_n.log()
    log_norm_n = torch.logaddexp(outside_norm_n, support_nS.logsumexp(1))
    log_probs_nS = support_nS - log_norm_n[:, None]
    tail_log_probs_n = (outside_norm_n if level_n is None else level_n) - log_norm_n
    losses_n = -times(target_nS, log_probs_nS).sum(1) - times(tail_n, tail_log_probs_n)

    if level_n is None:
        # each share of the tail, times the excess of the whole tail
        excess_n = mass_n * tail_log_probs_n.exp() - tail_n
        factor_n = torch.where(sum_n > 0, weights_n * excess_n / sum_n, 0)
    else:
        factor_n = weights_n * mass_n * (top_n - log_norm_n).exp()
    gradient_nV = scaled_nV.mul_(factor_n[:, None])
    if level_n is not None:
        gradient_nV.sub_((weights_n * tail_n / outside_n.clamp(min=1))[:, None])
        gradient_nV.scatter_(1, ids, 0)
    on_support_nS = weights_n[:, None] * (mass_n[:, None] * log_probs_nS.exp() - target_nS)
    gradient_nV.scatter_add_(1, ids, torch.where(mask, on_support_nS, 0).to(gradient_nV.dtype))
    return (weights_n * losses_n).sum(), gradient_nV


def _matching(
    logits_nV: Tensor, targets: SparseTargets, choice: Choice
) -> tuple[Tensor, float, Tensor]:
    """gem's Σ weight·loss and its gradient."""
    losses_n = matching_losses(logits_nV, targets.observed_ids, choice)
    vocabulary = torch.arange(logits_nV.shape[1], device=logits_nV.device)
    is_observed_nV = vocabulary == targets.observed_ids[:, None]
    log_probs_nV = logits_nV.log_softmax(1)
    gradient_nV = rules.matching_gradient(log_probs_nV, is_observed_nV, **choice.parameters)
    return (targets.weights * losses_n).sum(), 0.0, targets.weights[:, None] * gradient_nV


@torch.no_grad()
def _sequence_log_ratios(
    hidden_ND: Tensor, head: Head, targets: SparseTargets, objective: Objective
) -> Tensor | None:
    """Each position's mean of log p_y − log b_y over its example, [N], where the method reads it.

    It needs all positions of an example, which chunks may split: hence a separate pass.
    """
    if not objective.reads_examples:
        return None
    losses = [
        observed_losses(head.logits(hidden_ND[rows]), rows_of(targets, rows))
        for rows in chunks(len(hidden_ND), len(head.weight), hidden_ND.device)
    ]
    return example_means(-torch.cat(losses) - stored_log_prob(targets), targets.example_of)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` + left @ right, in place and without a temporary where the types allow.

    Not in place under autocast, which would multiply in float32 then, many times slower.
    """
    if total is None:
        return (left @ right).to(dtype)
    is_plain = not torch.is_autocast_enabled(left.device.type)
    if is_plain and total.dtype == left.dtype == right.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
