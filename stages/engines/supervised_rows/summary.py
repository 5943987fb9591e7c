"""What the log-probabilities of rows of logits are made of, by the kernels or by torch.

n rows, W logits of a row, which may be a part of the vocabulary, k the size of the top k.
"""

from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from .blocks import by_blocks, counts_at_least

_HAS_TRITON = find_spec("triton") is not None


class Summary(NamedTuple):
    """Sums and the largest logits of each row; one with NaN has a sum that is NaN."""

    highest_n: Tensor  # the largest logit
    sums_n: Tensor  # Σ exp(logit − highest)
    counts_n: Tensor  # of the logits that reach a given one
    logits_nk: Tensor  # the largest ones, in float32
    ids_nk: Tensor  # and their places


def summarise(logits_nW: Tensor, at_least_n: Tensor, top_k: int) -> Summary:
    """The summary of rows with at least `top_k` logits, with counts of those ≥ `at_least_n`."""
    if has_kernels(logits_nW, top_k):
        from . import kernels

        return Summary(*kernels.summarise(logits_nW, at_least_n, top_k))
    return summarised_in_torch(logits_nW, at_least_n, top_k)


def has_kernels(logits_nW: Tensor, top_k: int) -> bool:
    """Whether the kernels take such rows."""
    if not _HAS_TRITON:
        return False
    from . import kernels

    if not 0 < top_k <= kernels.MOST_TOP_K or logits_nW.stride(1) != 1:
        return False
    return logits_nW.device.type in kernels.DEVICES and logits_nW.dtype in kernels.DTYPES


def summarised_in_torch(logits_nW: Tensor, at_least_n: Tensor, top_k: int) -> Summary:
    """The same, block by block, with a float32 copy of the logits of a block."""
    of_block = partial(_summarised_block, top_k=top_k)
    return Summary(*by_blocks(of_block, logits_nW, at_least_n))


def _summarised_block(logits_nW: Tensor, at_least_n: Tensor, top_k: int) -> Summary:
    logits_nW = logits_nW.float()
    top = logits_nW.topk(top_k, dim=1)
    highest_n1 = logits_nW.amax(dim=1, keepdim=True)
    shifted_nW = logits_nW - highest_n1
    sums_n = shifted_nW.exp_().sum(dim=1)
    counts_n = counts_at_least(logits_nW, at_least_n[:, None], out=shifted_nW)
    return Summary(highest_n1[:, 0], sums_n, counts_n, top.values, top.indices)
