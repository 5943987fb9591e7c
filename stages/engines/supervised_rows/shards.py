"""Log-probabilities of rows whose logits are divided among processes by vocabulary.

With tensor parallelism each process computes the logits of a part of the vocabulary. Only its
summary and the logits asked for travel, instead of the whole rows. A process with the whole
vocabulary sends nothing.

n rows, W logits of a row in this process, P processes, k the size of the top k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .gather import Gathered
from .summary import Summary, summarise

AllGather = Callable[[Tensor], Tensor]  # [n, c] of this process -> [n, P, c]
Summarise = Callable[[Tensor, Tensor, int], Summary]


def shard_log_probs(
    logits_nW: Tensor,
    first_id: int,
    observed_n: Tensor,
    given_nw: Tensor,
    top_k: int,
    all_gather: AllGather,
) -> Gathered:
    """The log-probabilities of whole rows, the same in every process.

    `logits_nW` are of the ids from `first_id` on, without padding; the parts have at least `top_k`
    ids together. Of equal logits, those with the smaller ids are in the top k.
    """
    asked_nc = torch.cat((observed_n[:, None], given_nw.clamp_min(0)), dim=1) - first_id
    at_nc = all_gather(_at(logits_nW, asked_nc)).amax(dim=1)
    part = _widened(logits_nW, at_nc[:, 0], top_k)
    floats = torch.cat((part.highest_n[:, None], part.sums_n[:, None], part.logits_nk), dim=1)
    integers = torch.cat((part.counts_n[:, None], part.ids_nk + first_id), dim=1)
    floats_nPc, integers_nPc = all_gather(floats), all_gather(integers)
    highest_nP, sums_nP = floats_nPc[..., 0], floats_nPc[..., 1]
    highest_n1 = highest_nP.amax(dim=1, keepdim=True)
    norm_n1 = (sums_nP * (highest_nP - highest_n1).exp()).sum(dim=1, keepdim=True).log()
    ranks_n = integers_nPc[..., 0].sum(dim=1)
    values_nK, ids_nK = floats_nPc[..., 2:].flatten(1), integers_nPc[..., 1:].flatten(1)
    values_nK, order_nK = values_nK.sort(dim=1, descending=True, stable=True)
    ids_nk = ids_nK.gather(1, order_nK[:, :top_k])
    return _gathered(at_nc, values_nK[:, :top_k], ids_nk, ranks_n, highest_n1, norm_n1)


def whole_log_probs(
    logits_nV: Tensor,
    observed_n: Tensor,
    given_nw: Tensor,
    top_k: int,
    summarise: Summarise = summarise,
) -> Gathered:
    """The same in one process."""
    asked_nc = torch.cat((observed_n[:, None], given_nw.clamp_min(0)), dim=1)
    at_nc = logits_nV.gather(1, asked_nc).float()
    highest_n, sums_n, ranks_n, top_nk, ids_nk = summarise(logits_nV, at_nc[:, 0], top_k)
    norm_n1 = sums_n.log()[:, None]
    return _gathered(at_nc, top_nk, ids_nk, ranks_n, highest_n[:, None], norm_n1)


def _gathered(
    at_nc: Tensor, top_nk: Tensor, ids_nk: Tensor, ranks_n: Tensor, highest: Tensor, norm: Tensor
) -> Gathered:
    """Log-probabilities of logits, in an order that is exact far from 0."""
    at_nc, top_nk = (at_nc - highest) - norm, (top_nk - highest) - norm
    return Gathered(at_nc[:, 0], ranks_n, ids_nk, top_nk, at_nc[:, 1:])


def _at(logits_nW: Tensor, places_nc: Tensor) -> Tensor:
    """The logits at some places in float32, −inf at those of other processes."""
    W = logits_nW.shape[1]
    if not W:
        return logits_nW.new_full(places_nc.shape, -torch.inf, dtype=torch.float32)
    here_nc = logits_nW.gather(1, places_nc.clamp(0, W - 1)).float()
    return here_nc.masked_fill((places_nc < 0) | (places_nc >= W), -torch.inf)


def _widened(logits_nW: Tensor, at_least_n: Tensor, top_k: int) -> Summary:
    """A summary with −inf in the top k if the part has fewer ids."""
    n, W = logits_nW.shape
    if not W:
        nothing_n = at_least_n.new_full((n,), -torch.inf)
        nothing_nk = nothing_n[:, None].expand(n, top_k)
        counts_n, ids_nk = torch.zeros_like(nothing_n).int(), torch.zeros_like(nothing_nk).int()
        return Summary(nothing_n, torch.zeros_like(nothing_n), counts_n, nothing_nk, ids_nk)
    part = summarise(logits_nW, at_least_n, min(top_k, W))
    missing = (0, top_k - part.logits_nk.shape[1])
    return part._replace(
        logits_nk=torch.nn.functional.pad(part.logits_nk, missing, value=-torch.inf),
        ids_nk=torch.nn.functional.pad(part.ids_nk, missing),
    )
