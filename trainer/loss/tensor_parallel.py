"""The sparse cross-entropy where each process has the logits of a part of the vocabulary.

For trainers that divide the output head (Megatron's tensor parallelism). The loss is that of
`sparse`, with the tail in the student's shape. With Q on the support S, Q_tail outside, Z the sum
of exp z over the vocabulary and T that over its part outside S,

    CE = log Z·Σ_S Q_k − Σ_S Q_k·z_k − Q_tail·(log T − log Z),

so that the processes exchange two maxima and three sums a position, and never logits. Each has the
gradient of its own logits: (Σ_S Q + Q_tail)·p_j − Q_j, and, outside S, −Q_tail·exp(z_j)/T.

N supervised positions, W ids of this process, S entries of the widest support.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sparse import at_least_float32, times


def vocabulary_parallel_cross_entropy(
    logits: Tensor,
    first_id: int,
    observed_ids: Tensor,
    support_ids: Tensor,
    support_probs: Tensor,
    tail_mass: Tensor,
    trust: Tensor,
    weights: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Σ weights·CE(Q, p) in nats over N positions, a scalar, the same in every process.

    Args:
        logits: [N, W], of the ids `first_id` to `first_id` + W − 1; each id is in one process.
        first_id: The first id of this process.
        observed_ids: [N] int64.
        support_ids: [N, S] int64, distinct within a row, the observed id among them; -1 pads.
        support_probs: [N, S], ignored where the id is -1.
        tail_mass: [N], 1 − Σ support_probs.
        trust: [N], γ, 0 to 1.
        weights: [N], of each position's loss.
        group: The processes that share the vocabulary; all of them by default.

    All but `logits` and `first_id` are the same in every process. Gradients reach `logits`.
    """
    is_entry_NS = support_ids >= 0
    is_observed_NS = support_ids == observed_ids[:, None]
    share_N1 = (1 - trust)[:, None]
    target_NS = share_N1 * torch.where(is_entry_NS, support_probs, 0)
    target_NS = target_NS + trust[:, None] * is_observed_NS
    tail_N = (1 - trust) * tail_mass
    return _Loss.apply(logits, support_ids - first_id, target_NS, tail_N, weights, group)


class _Loss(torch.autograd.Function):
    """Computes its gradient with its value."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NW: Tensor,
        places_NS: Tensor,
        target_NS: Tensor,
        tail_N: Tensor,
        weights_N: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        scores_NW = at_least_float32(logits_NW)
        own_NS = (places_NS >= 0) & (places_NS < scores_NW.shape[1])
        rows, columns = own_NS.nonzero()[:, 0], places_NS[own_NS]
        outside_NW = scores_NW.clone()
        outside_NW[rows, columns] = -torch.inf

        most_N2 = torch.stack([scores_NW.amax(1), outside_NW.amax(1)], dim=1)
        dist.all_reduce(most_N2, dist.ReduceOp.MAX, group)
        most_N2 = most_N2.clamp_min(torch.finfo(most_N2.dtype).min)  # nothing may be outside
        at_support = torch.zeros_like(target_NS, dtype=scores_NW.dtype)
        at_support[own_NS] = scores_NW[rows, columns]
        sums_N3 = torch.stack(
            [
                (scores_NW - most_N2[:, :1]).exp().sum(1),
                (outside_NW - most_N2[:, 1:]).exp().sum(1),
                times(target_NS, at_support).sum(1),
            ],
            dim=1,
        )
        dist.all_reduce(sums_N3, dist.ReduceOp.SUM, group)
        log_all_N = most_N2[:, 0] + sums_N3[:, 0].log()
        log_outside_N = most_N2[:, 1] + sums_N3[:, 1].log()
        has_tail_N = (tail_N != 0) & (sums_N3[:, 1] > 0)
        tail_N = torch.where(has_tail_N, tail_N, 0)
        losses_N = target_NS.sum(1) * log_all_N - sums_N3[:, 2]
        losses_N = losses_N - times(tail_N, log_outside_N - log_all_N)

        mass_N = target_NS.sum(1) + tail_N
        gradient_NW = mass_N[:, None] * (scores_NW - log_all_N[:, None]).exp()
        level_N1 = torch.where(has_tail_N, log_outside_N, torch.inf)[:, None]
        gradient_NW -= tail_N[:, None] * (outside_NW - level_N1).exp()
        gradient_NW[rows, columns] -= target_NS[own_NS].to(gradient_NW.dtype)
        ctx.save_for_backward((weights_N[:, None] * gradient_NW).to(logits_NW.dtype))
        return (weights_N * losses_N).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NW,) = ctx.saved_tensors
        return gradients[0] * gradient_NW, *[None] * 5
