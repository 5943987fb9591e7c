"""The sparse soft-target loss of a chunk of scores and its gradient: one Triton kernel a row.

The kernel reads the raw scores W·h + bias of a row twice and overwrites them once, with the
gradient with respect to them. The first pass computes the log-sum-exp outside the support: the
scores of the support are replaced by −inf before it, so nothing is subtracted and nothing cancels.
The loss and the factor of the tail are known after the first pass. The second pass writes the
gradient outside the support, and then the gradients on the support replace its scores.

Rows may be wider (W) than the vocabulary. The rest is scratch; a width of whole 16-byte words lets
a vocabulary of any size be read in such words.

The reference is `chunk_in_torch`. Triton's interpreter runs the kernels on a CPU.

n positions, V vocabulary, S entries of the widest support. This module needs triton.
"""

from typing import Any

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head

DEVICES = ("cpu",) if triton.knobs.runtime.interpret else ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 8192
_WARPS = 16


def loss_and_gradient_(
    scores_nW: Tensor,
    head: Head,
    ids_nS: Tensor,
    mask_nS: Tensor,
    target_nS: Tensor,
    tail_n: Tensor,
    weights_n: Tensor,
    *,
    is_uniform: bool = False,
    block: int = _BLOCK,
    warps: int = _WARPS,
) -> Tensor:
    """Return weight·loss of each row, [n]; the raw scores are replaced by their gradient.

    `target_nS` is the target on the support, `tail_n` its mass outside, spread evenly if
    `is_uniform`, else in the student's own shape.
    """
    losses_n = torch.empty(len(scores_nW), dtype=torch.float32, device=scores_nW.device)
    if len(scores_nW):
        _loss_kernel[(len(scores_nW),)](
            *_shape(scores_nW, head),
            *_support(ids_nS, mask_nS),
            target_nS.float().contiguous(),
            tail_n.float().contiguous(),
            weights_n.float().contiguous(),
            losses_n,
            UNIFORM=is_uniform,
            **_constants(head, ids_nS, block, warps),
        )
    return losses_n


def summarise(
    scores_nW: Tensor,
    head: Head,
    ids_nS: Tensor,
    mask_nS: Tensor,
    *,
    block: int = _BLOCK,
    warps: int = _WARPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a live method reads of the logits; the scores are left as they are.

    These are the logits of the support, [n, S], −inf at the padding; the log-sum-exp of all others,
    [n], −inf if there are none; and the entropy of these others under their own softmax, [n].
    """
    device = scores_nW.device
    support_nS = torch.empty(ids_nS.shape, dtype=torch.float32, device=device)
    outside_2n = torch.empty(2, len(scores_nW), dtype=torch.float32, device=device)
    if len(scores_nW):
        _summary_kernel[(len(scores_nW),)](
            *_shape(scores_nW, head),
            *_support(ids_nS, mask_nS),
            support_nS,
            *outside_2n,
            **_constants(head, ids_nS, block, warps),
        )
    return support_nS, outside_2n[0], outside_2n[1]


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values.mul_(factor)` for a factor on the device; touches no memory where it is 1."""
    if values.numel():
        grid = (triton.cdiv(values.numel(), 4096),)
        _scale_kernel[grid](values, values.numel(), factor, BLOCK=4096)
    return values


def _shape(scores_nW: Tensor, head: Head) -> tuple[Any, ...]:
    """The first arguments of the kernels that read rows."""
    width, vocab_size = scores_nW.shape[1], len(head.weight)
    assert scores_nW.is_contiguous()
    assert vocab_size <= width
    return scores_nW, width, vocab_size, float(head.scale), float(head.softcap or 1.0)


def _support(ids_nS: Tensor, mask_nS: Tensor) -> tuple[Any, ...]:
    return ids_nS.contiguous(), mask_nS.contiguous(), ids_nS.shape[1]


def _constants(head: Head, ids_nS: Tensor, block: int, warps: int) -> dict[str, Any]:
    return {
        "CAPPED": head.softcap is not None,
        "BLOCK": min(block, triton.next_power_of_2(len(head.weight))),
        "SUPPORT": triton.next_power_of_2(ids_nS.shape[1]),
        "num_warps": warps,
    }


@triton.jit
def _logit(score, scale, cap, CAPPED: tl.constexpr):
    """softcap·tanh(scale·score/softcap); −inf stays −inf."""
    z = score * scale
    if CAPPED:
        tanh = 1 - 2 / (tl.exp(2 * z / cap) + 1)
        z = tl.where(score == -float("inf"), -float("inf"), cap * tanh)
    return z


@triton.jit
def _take_out(row, ids, valid):
    """The scores of the support, replaced by −inf in the row."""
    score = tl.load(row + ids, mask=valid, other=-float("inf")).to(tl.float32)
    nothing = tl.full(ids.shape, -float("inf"), tl.float32)
    tl.debug_barrier()  # every lane has read its score before any lane writes
    tl.store(row + ids, nothing.to(row.dtype.element_ty), mask=valid)
    tl.debug_barrier()
    return score


@triton.jit
def _score(row, at, size, width):
    """A block of a row, −inf beyond its end; read up to the width, which keeps whole words."""
    score = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
    return tl.where(at < size, score, -float("inf"))


@triton.jit
def _outside(
    row, size, width, scale, cap,
    CAPPED: tl.constexpr, UNIFORM: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit, Σ exp(logit − largest), and if asked for, Σ logit or the entropy."""
    lanes = tl.arange(0, BLOCK)
    top = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    levels = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        z = _logit(_score(row, start + lanes, size, width), scale, cap, CAPPED)
        higher = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        rescale = tl.exp(top - shift)
        scaled = tl.exp(z - shift)
        if UNIFORM:
            levels += tl.where(z == -float("inf"), 0.0, z)
        if ENTROPY:  # Σ exp(z − top)·(z − top)
            drop = tl.where(top == -float("inf"), 0.0, top - shift)
            below = tl.where(z == -float("inf"), 0.0, z - shift)
            levels = (levels + sums * drop) * rescale + scaled * below
        sums = sums * rescale + scaled
        top = higher
    total = tl.sum(sums, 0)
    level = tl.sum(levels, 0)
    if ENTROPY:
        level = tl.where(total == 0, 0.0, tl.log(total) - level / total)
    return top, total, level


@triton.jit
def _loss_kernel(
    scores, width, size, scale, cap,  # [n, W]
    ids, mask, entries, target, tails, weights,  # [n, S] twice, their S, [n, S], [n] twice
    losses,  # [n]
    CAPPED: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr, SUPPORT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = scores + n * width
    entry = tl.arange(0, SUPPORT)
    is_entry = entry < entries
    id_S = tl.load(ids + n * entries + entry, mask=is_entry, other=0)
    valid = is_entry & (tl.load(mask + n * entries + entry, mask=is_entry, other=0) != 0)
    q_S = tl.load(target + n * entries + entry, mask=valid, other=0.0)
    q_tail = tl.load(tails + n)
    weight = tl.load(weights + n)

    z_S = _logit(_take_out(row, id_S, valid), scale, cap, CAPPED)
    z_S = tl.where(valid, z_S, -float("inf"))
    top, sum_out, level = _outside(row, size, width, scale, cap, CAPPED, UNIFORM, False, BLOCK)

    highest = tl.maximum(top, tl.max(z_S, 0))
    outside_part = tl.where(sum_out == 0, 0.0, sum_out * tl.exp(top - highest))
    log_total = tl.log(outside_part + tl.sum(tl.exp(z_S - highest), 0))
    log_p_S = (z_S - highest) - log_total  # in this order: far from 0 the norm itself is coarse
    count_out = size - tl.sum(valid.to(tl.int32), 0)
    if UNIFORM:
        log_p_tail = level / tl.maximum(count_out, 1) - highest - log_total
    else:
        log_p_tail = (top - highest) + tl.log(sum_out) - log_total
    loss_S = tl.where(q_S > 0, q_S * log_p_S, 0.0)
    loss = -tl.sum(loss_S, 0) - tl.where(q_tail > 0, q_tail * log_p_tail, 0.0)
    tl.store(losses + n, weight * loss)

    mass = tl.sum(q_S, 0) + q_tail
    if UNIFORM:
        factor = weight * mass * tl.where(sum_out == 0, 0.0, tl.exp((top - highest) - log_total))
        less = weight * q_tail / tl.maximum(count_out, 1)
    else:
        excess = mass * tl.exp(log_p_tail) - q_tail
        factor = tl.where(sum_out == 0, 0.0, weight * excess / sum_out)
        less = 0.0
    shift = tl.where(top == -float("inf"), 0.0, top)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        score = _score(row, start + lanes, size, width)
        z = _logit(score, scale, cap, CAPPED)
        gradient = (tl.exp(z - shift) * factor - less) * scale
        if CAPPED:
            gradient *= 1 - (z / cap) * (z / cap)
            gradient = tl.where(score == -float("inf"), 0.0, gradient)
        is_inside = start + lanes < width
        tl.store(row + start + lanes, gradient.to(row.dtype.element_ty), mask=is_inside)
    gradient_S = weight * (mass * tl.exp(log_p_S) - q_S) * scale
    if CAPPED:
        gradient_S *= 1 - (z_S / cap) * (z_S / cap)
    tl.debug_barrier()
    tl.store(row + id_S, gradient_S.to(row.dtype.element_ty), mask=valid)


@triton.jit
def _summary_kernel(
    scores, width, size, scale, cap,  # [n, W]
    ids, mask, entries,  # [n, S] twice, their S
    support, outside, entropies,  # [n, S], [n] twice
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, SUPPORT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = scores + n * width
    entry = tl.arange(0, SUPPORT)
    is_entry = entry < entries
    id_S = tl.load(ids + n * entries + entry, mask=is_entry, other=0)
    valid = is_entry & (tl.load(mask + n * entries + entry, mask=is_entry, other=0) != 0)
    score_S = _take_out(row, id_S, valid)
    top, sum_out, entropy = _outside(row, size, width, scale, cap, CAPPED, False, True, BLOCK)
    tl.store(support + n * entries + entry, _logit(score_S, scale, cap, CAPPED), mask=is_entry)
    tl.store(outside + n, tl.where(sum_out == 0, -float("inf"), top + tl.log(sum_out)))
    tl.store(entropies + n, entropy)
    tl.debug_barrier()
    tl.store(row + id_S, score_S.to(row.dtype.element_ty), mask=valid)


@triton.jit
def _scale_kernel(values, size, factor, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        old = tl.load(values + at, mask=at < size, other=0.0)
        tl.store(values + at, (old.to(tl.float32) * by).to(old.dtype), mask=at < size)
