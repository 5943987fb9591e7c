"""Random heads and targets of every method, for tests of the fused loss."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choices, choose
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss.head import Head
from qpipe.trainer.loss.objective import Loss, Objective
from torch import Tensor

SIZE, VOCAB_SIZE, WIDTH, SUPPORT = 23, 50, 8, 6
CHOICES = [
    *(each.resolved(2.0) if each.unresolved else each for each in choices()),
    choose("gem", "live", {"h": "logsigmoid"}),
]
IDS = [f"{each.method.name}-{each.form}-{i}" for i, each in enumerate(CHOICES)]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "capped": {"scale": 0.5, "softcap": 3.0, "bias": True},
}
Gradients = tuple[Tensor, ...]


def objective_of(choice: Choice) -> Objective:
    return Objective(choice, "uniform" if choice.stored == "uniform" else "student", choice.stored)


def random_targets(choice: Choice, seed: int = 0, support: int = SUPPORT) -> SparseTargets:
    """Targets in float64 on ragged supports; one entry where the choice stores no more."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if choice.stored in ("observed", "base-observed", "uniform"):
        support = 1
    ids = rand(SIZE, VOCAB_SIZE).argsort(1)[:, :support]
    counts = torch.randint(1, support + 1, (SIZE, 1), generator=generator)
    mask = torch.arange(support) < counts
    ids = torch.where(mask, ids, ids[:, :1])
    masses = torch.where(mask, rand(SIZE, support), 0)
    tail = rand(SIZE)
    total = masses.sum(1) + tail
    return SparseTargets(
        observed_ids=ids[:, 0],
        example_of=torch.arange(SIZE) // 6,  # torn by the chunks
        trust=rand(SIZE),
        weights=rand(SIZE) + 0.5,
        support_ids=ids,
        support_mask=mask,
        support_probs=masses / total[:, None],
        tail_mass=tail / total,
    )


def to_dtype(targets: SparseTargets, dtype: torch.dtype) -> SparseTargets:
    values = (getattr(targets, field.name) for field in fields(targets))
    return SparseTargets(*(v.to(dtype) if v.is_floating_point() else v for v in values))


def random_head(seed: int = 1, bias: bool = False, **form: Any) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = randn(SIZE, WIDTH), randn(VOCAB_SIZE, WIDTH)
    return hidden, Head(weight, randn(VOCAB_SIZE) if bias else None, **form)


def run(
    loss: Callable[[Tensor, Head], Loss], hidden: Tensor, head: Head, dtype: torch.dtype
) -> tuple[Loss, Gradients]:
    """The loss at these values in some precision, and the gradients of 1.7 times it."""
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
    bias = leaves[2] if len(leaves) > 2 else None
    result = loss(leaves[0], replace(head, weight=leaves[1], bias=bias))
    return result, torch.autograd.grad(1.7 * result.sum, leaves)
