"""Log-probabilities of rows whose logits are divided among processes by vocabulary.

With tensor parallelism each process computes the logits of a part of the vocabulary. Only its
top k, its log-sum-exp, the logits asked for and a count travel, instead of the whole rows.

n rows, W logits of a row in this process, P processes, k the size of the top k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .gather import Gathered

AllGather = Callable[[Tensor], Tensor]  # [n, c] of this process -> [n, P, c]


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
    ids together.
    """
    logits_nW = logits_nW.float()
    n, W = logits_nW.shape
    log_sums_n1 = all_gather(logits_nW.logsumexp(dim=1, keepdim=True)).logsumexp(dim=1)
    asked_nc = torch.cat((observed_n[:, None], given_nw.clamp_min(0)), dim=1) - first_id
    is_here_nc = (asked_nc >= 0) & (asked_nc < W)
    at_nc = logits_nW.new_full(asked_nc.shape, -torch.inf)
    if W:
        here_nc = logits_nW.gather(1, asked_nc.clamp(0, W - 1))
        at_nc = torch.where(is_here_nc, here_nc, at_nc)
    at_nc = all_gather(at_nc).amax(dim=1)
    ranks_n = all_gather((logits_nW >= at_nc[:, :1]).sum(dim=1, keepdim=True)).sum(dim=(1, 2))
    values_nk = logits_nW.new_full((n, top_k), -torch.inf)
    ids_nk = torch.zeros((n, top_k), dtype=torch.int64, device=logits_nW.device)
    own = logits_nW.topk(min(top_k, W), dim=1)
    values_nk[:, : own.values.shape[1]] = own.values
    ids_nk[:, : own.indices.shape[1]] = own.indices + first_id
    values_nk, chosen_nk = all_gather(values_nk).flatten(1).topk(top_k, dim=1)
    ids_nk = all_gather(ids_nk).flatten(1).gather(1, chosen_nk)
    at_nc = at_nc - log_sums_n1
    return Gathered(at_nc[:, 0], ranks_n, ids_nk, values_nk - log_sums_n1, at_nc[:, 1:])
