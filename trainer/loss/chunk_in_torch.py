"""The loss of a chunk of supervised positions and its gradient, in passes of torch.

With q the target on a support S, m its total mass, q_t the mass of its tail, p the student, C the
complement of S, the gradient with respect to the logits is

    m·p_k − q_k on S,   (m·p_C − q_t)·p_k/p_C on C        (tail shape "student")
    m·p_k − q_k on S,   m·p_k − q_t/|C| on C              (tail shape "uniform")

C is summed without S, so nothing cancels where p_C is tiny.

n positions of the chunk, D hidden size, V vocabulary, S entries of the widest support.
"""

import torch
from torch import Tensor

from ...pipeline.methods import rules
from ...pipeline.methods.definition import Choice
from ..data.batch import SparseTargets
from .head import Head
from .objective import live_targets, matching_losses
from .sparse import TailShape, times


def loss_and_gradient(
    hidden_nD: Tensor,
    head: Head,
    targets: SparseTargets,
    tail_shape: TailShape,
    live: Choice | None,
    known: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return weight·loss [n], the error bounds [n], and the gradient of the raw scores, [n, V].

    `live` is the method if its targets depend on the student; `known` as in `live_targets`.
    """
    logits_nV = head.logits(hidden_nD)
    capped_nV = logits_nV.clone() if head.softcap is not None else logits_nV
    bounds_n = own_n = None
    if live is not None and live.residual == "gem":
        losses_n, gradient_nV = _matching(logits_nV, targets, live)
    else:
        if live is not None:
            followed = live_targets(live, logits_nV, targets, **known)
            targets, bounds_n, own_n = followed.targets, followed.error_bounds, followed.losses
        losses_n, gradient_nV = _sparse_(logits_nV, targets, tail_shape)
        losses_n = losses_n if own_n is None else targets.weights * own_n
    return losses_n, bounds_n, head.into_scores(gradient_nV, capped_nV)


def masses(targets: SparseTargets, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The target on the support, [n, S], and its mass outside, [n]."""
    is_observed_nS = targets.support_ids == targets.observed_ids[:, None]
    trusted_nS = targets.trust[:, None] * (is_observed_nS & targets.support_mask)
    share_n = 1 - targets.trust
    # rounding can leave 1e-8 of mass outside a support that is the whole vocabulary
    has_outside_n = targets.support_mask.sum(1) < vocab_size
    tail_n = torch.where(has_outside_n, share_n * targets.tail_mass, 0)
    return trusted_nS + share_n[:, None] * targets.support_probs, tail_n


def _sparse_(
    logits_nV: Tensor, targets: SparseTargets, tail_shape: TailShape
) -> tuple[Tensor, Tensor]:
    """weight·loss and its gradient, the logits overwritten."""
    ids, mask = targets.support_ids, targets.support_mask
    target_nS, tail_n = masses(targets, logits_nV.shape[1])
    outside_n = logits_nV.shape[1] - mask.sum(1)
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
    return weights_n * losses_n, gradient_nV


def _matching(logits_nV: Tensor, targets: SparseTargets, choice: Choice) -> tuple[Tensor, Tensor]:
    """gem's weight·loss and its gradient."""
    losses_n = matching_losses(logits_nV, targets.observed_ids, choice)
    vocabulary = torch.arange(logits_nV.shape[1], device=logits_nV.device)
    is_observed_nV = vocabulary == targets.observed_ids[:, None]
    log_probs_nV = logits_nV.log_softmax(1)
    gradient_nV = rules.matching_gradient(log_probs_nV, is_observed_nV, **choice.parameters)
    return targets.weights * losses_n, targets.weights[:, None] * gradient_nV
