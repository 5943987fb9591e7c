"""The output head: from hidden states to logits, a few rows at a time.

n positions, V vocabulary, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_VALUES = 2**24  # logits at once: 64 MiB in float32
TIMES_ON_GPU = 4  # times as many: fewer leave an H100 idle, 2.8 times slower, and save no memory
TIMES_IN_KERNELS = 14  # times as many, 0.44 GiB in bfloat16: each chunk adds to all of dW,
OF_HEAD = 0.5  # or half as many as the head has weights, little beside their float32 gradient
TILE = 128  # rows of a tile of a product, of which these chunks are multiples
_WORD = 64  # rows of scores start at multiples of it, for any vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """An output head: the logits are softcap·tanh(z/softcap) of z = scale·(W·h + bias)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """The logits [n, V], in float32 at least."""
        return self.from_scores(torch.nn.functional.linear(hidden_nD, self.weight, self.bias))

    def from_scores(self, scores_nV: Tensor) -> Tensor:
        """The logits of raw scores W·h + bias, in float32 at least."""
        logits_nV = scores_nV.to(torch.promote_types(scores_nV.dtype, torch.float32))
        if self.scale != 1:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV

    def empty_scores(self, rows: int) -> Tensor:
        """Memory for the raw scores of some rows, each in whole words, [n, W]."""
        width = -(-len(self.weight) // _WORD) * _WORD
        return self.weight.new_empty(rows, width)

    def write_scores(self, hidden_nD: Tensor, scores_nW: Tensor) -> Tensor:
        """Write W·h + bias to such memory; a view of it, [n, V]."""
        scores_nV = scores_nW[:, : len(self.weight)]
        if self.bias is None:
            return torch.mm(hidden_nD, self.weight.T, out=scores_nV)
        return torch.addmm(self.bias, hidden_nD, self.weight.T, out=scores_nV)

    def into_scores(self, gradient_nV: Tensor, logits_nV: Tensor) -> Tensor:
        """The gradient with respect to W·h + bias, from that with respect to the logits."""
        if self.softcap is not None:
            gradient_nV = gradient_nV * (1 - (logits_nV / self.softcap).square())
        return gradient_nV if self.scale == 1 else gradient_nV * self.scale


def chunks(rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows whose logits fit in `CHUNK_VALUES`; one empty chunk without rows."""
    values = CHUNK_VALUES * (1 if device.type == "cpu" else TIMES_ON_GPU)
    size = max(1, values // vocab_size)
    return (slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size))


def even_chunks(rows: int, vocab_size: int, width: int) -> Iterator[slice]:
    """Consecutive rows for the kernels: as many in each, in whole tiles but for the last."""
    values = max(TIMES_IN_KERNELS * CHUNK_VALUES, int(OF_HEAD * vocab_size * width))
    most = max(1, values // (vocab_size * TILE))
    tiles = max(1, -(-rows // TILE))
    size = TILE * -(-tiles // -(-tiles // most))
    return (slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size))
