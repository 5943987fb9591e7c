"""Goes through rows of logits in blocks that a CPU keeps in its cache.

A large tensor is new memory each time it is made, and each page of it is cleared when it is first
written, which takes longer than the arithmetic. A GPU takes all rows at once.

n rows, W logits of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_VALUES = 2**21  # logits of a block: 8 MiB in float32


def by_blocks(
    of_rows: Callable[..., tuple[Tensor, ...]], logits_nW: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """What a function of rows returns for all of them; `others` have a value for each row too."""
    n, W = logits_nW.shape
    size = max(1, BLOCK_VALUES // max(1, W))
    if n <= size or logits_nW.device.type != "cpu":
        return of_rows(logits_nW, *others)
    blocks = zip(*(tensor.split(size) for tensor in (logits_nW, *others)), strict=True)
    whole: tuple[Tensor, ...] = ()
    for start, block in zip(range(0, n, size), blocks, strict=True):
        part = of_rows(*block)
        # parts that were kept to the end would lie between the freed temporaries of blocks, so that
        # each block would take more memory
        whole = whole or tuple(each.new_empty(n, *each.shape[1:]) for each in part)
        for tensor, each in zip(whole, part, strict=True):
            tensor[start : start + size] = each
    return whole


def counts_at_least(values_nW: Tensor, least_n1: Tensor, out: Tensor) -> Tensor:
    """How many values of each row reach its least one, [n]; `out` is overwritten, [n, W].

    Ones in float32, whose sum is exact up to 2^24, are summed faster than truth values.
    """
    return torch.ge(values_nW, least_n1, out=out).sum(dim=1).long()
