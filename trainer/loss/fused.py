"""The output head, its log-sum-exp and the sparse cross-entropy in one, a few rows at a time.

The scores of a chunk of supervised positions are computed, replaced by their gradient in place,
multiplied back into the gradients of the hidden states and of the head, and freed: the full [N, V]
never exists. Value and gradient are those of `objective`, the plain reference. On a GPU with Triton
a chunk is computed by `kernels`, elsewhere by passes of torch.

N supervised positions, n those of a chunk, D hidden size, V vocabulary, S widest support.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...pipeline.methods.definition import Choice
from ..data.batch import SparseTargets
from . import chunk_in_kernels, chunk_in_torch
from .head import Head, chunks, even_chunks
from .objective import Loss, Objective, example_means, stored_log_prob
from .sparse import TailShape, observed_losses


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
        bounds_N = hidden_ND.new_zeros(len(hidden_ND), dtype=add_up)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = None
        grad_bias = weight_VD.new_zeros(len(weight_VD), dtype=add_up) if needs_bias else None
        dtype = _product_dtype(hidden_ND)
        bias = None if bias_V is None else bias_V.to(dtype)
        cast = replace(head, weight=weight_VD.to(dtype), bias=bias)

        # every cast is made here, once
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts, compute = _computation(cast, hidden_ND, targets, tail_shape, live, ratios_N)
            losses: list[Tensor] = []
            for rows in parts:
                hidden_nD = hidden_ND[rows].to(dtype)
                losses_n, bounds_n, gradient_nV = compute(rows, hidden_nD)
                losses.append(losses_n)
                if bounds_n is not None:
                    bounds_N[rows] = bounds_n
                if grad_bias is not None:
                    grad_bias += gradient_nV.sum(0, dtype=add_up)
                gradient_nV = gradient_nV.to(dtype)
                if grad_hidden is not None:
                    _write_product(gradient_nV, cast.weight, grad_hidden[rows])
                if needs_weight:
                    grad_weight = add_product(grad_weight, gradient_nV.T, hidden_nD, add_up)
            total = torch.cat(losses).sum(dtype=add_up)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(bounds_N)
        return total, bounds_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scale, dtype = gradients[0], ctx.weight_dtype
        return (
            None if hidden is None else chunk_in_kernels.scaled_(hidden, scale),
            None if weight is None else chunk_in_kernels.scaled_(weight, scale).to(dtype),
            None if bias is None else bias.mul_(scale).to(dtype),
            *[None] * 5,
        )


_Compute = Callable[[slice, Tensor], tuple[Tensor, Tensor | None, Tensor]]


def _computation(
    head: Head,
    hidden_ND: Tensor,
    targets: SparseTargets,
    tail_shape: TailShape,
    live: Choice | None,
    ratios_N: Tensor | None,
) -> tuple[Iterable[slice], _Compute]:
    """The chunks of rows, and the function of one of them and of its hidden states [n, D]."""
    device, count, vocab_size = hidden_ND.device, len(hidden_ND), len(head.weight)

    def known(rows: slice) -> dict[str, Tensor]:
        return {} if ratios_N is None else {"sequence_log_ratio": ratios_N[rows]}

    if not chunk_in_kernels.has_kernels(device, head.weight.dtype, live):
        return chunks(
            count, vocab_size, device
        ), lambda rows, hidden_nD: chunk_in_torch.loss_and_gradient(
            hidden_nD, head, rows_of(targets, rows), tail_shape, live, known(rows)
        )
    parts = list(even_chunks(count, *head.weight.shape))
    scores_NW = head.empty_scores(parts[0].stop)  # the first chunk is the largest
    frozen = chunk_in_torch.masses(targets, vocab_size)

    def in_kernels(rows: slice, hidden_nD: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return chunk_in_kernels.loss_and_gradient_(
            hidden_nD,
            scores_NW[: len(hidden_nD)],
            head,
            rows_of(targets, rows),
            (frozen[0][rows], frozen[1][rows]),
            tail_shape,
            live,
            known(rows),
        )

    return parts, in_kernels


def _write_product(left: Tensor, right: Tensor, to: Tensor) -> None:
    """Write left @ right to `to`, without a temporary where the types allow."""
    if left.dtype == to.dtype:
        torch.mm(left, right, out=to)
    else:
        to.copy_(left @ right)


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The type in which the head multiplies: that of autocast if it is on."""
    kind = hidden_ND.device.type
    is_cast = torch.is_autocast_enabled(kind) and hidden_ND.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else hidden_ND.dtype


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

    On CUDA a product of 16-bit matrices is added to a float32 sum by the product itself.
    """
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    product = left @ right
    return product.to(dtype) if total is None else total.add_(product)
