"""Log-probabilities of rows of logits: of the observed token, the top k, and given ids.

n rows, V the vocabulary, k the size of the top k, w given ids of a row, padded with -1.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import by_blocks, counts_at_least


class Gathered(NamedTuple):
    """The log-probabilities at some ids of each row; those of padding are meaningless."""

    observed_n: Tensor
    ranks_n: Tensor  # of the observed token: 1 is the mode
    ids_nk: Tensor
    top_nk: Tensor
    given_nw: Tensor


def gathered_log_probs(
    logits_nV: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int
) -> Gathered:
    """Log-softmax in float32, and what is gathered from it, block by block."""
    of_block = partial(_gathered_block, top_k=top_k)
    return Gathered(*by_blocks(of_block, logits_nV, observed_n, given_nw))


def _gathered_block(
    logits_nV: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int
) -> Gathered:
    log_probs_nV = logits_nV.log_softmax(dim=1, dtype=torch.float32)
    top = log_probs_nV.topk(top_k, dim=1)
    observed_n1 = log_probs_nV.gather(1, observed_n[:, None])
    at_nw = log_probs_nV.gather(1, given_nw.clamp_min(0))
    ranks_n = counts_at_least(log_probs_nV, observed_n1, out=log_probs_nV)
    return Gathered(observed_n1[:, 0], ranks_n, top.indices, top.values, at_nw)


def triton_log_probs(
    logits_nV: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int
) -> Gathered:
    """The same by the kernels of vLLM's second model runner, without a float32 copy of the logits.

    The function of the top k is named differently before vLLM 0.29.
    """
    from vllm.v1.worker.gpu.sample import logprob

    names = ("compute_topk_scores", "compute_topk_logprobs")
    of_top = next(getattr(logprob, name) for name in names if hasattr(logprob, name))
    ids_nc, log_probs_nc, ranks_n, *_ = of_top(logits_nV, top_k, observed_n)
    at_nw = given_nw.to(torch.float32)
    if given_nw.shape[1]:
        at_nw = logprob.compute_token_logprobs(logits_nV, given_nw.clamp_min(0))
    return Gathered(log_probs_nc[:, 0], ranks_n, ids_nc[:, 1:], log_probs_nc[:, 1:], at_nw)
