"""The output head: from hidden states to logits, a few rows at a time.

n positions, V vocabulary, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_VALUES = 2**24  # logits at once: 64 MiB in float32
TIMES_ON_GPU = 4  # times as many: fewer leave an H100 idle, 2.8 times slower, and save no memory


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """An output head: the logits are softcap·tanh(z/softcap) of z = scale·(W·h + bias)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """The logits [n, V], in float32 at least."""
        logits_nV = torch.nn.functional.linear(hidden_nD, self.weight, self.bias)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        if self.scale != 1:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV

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
