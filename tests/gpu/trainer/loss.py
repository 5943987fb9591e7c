"""The loss alone: forward and backward, and the products that it is made of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from qpipe.pipeline.methods.table import choose
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss import chunk_in_kernels, chunk_in_torch, fused
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head
from qpipe.trainer.loss.objective import Objective
from torch import Tensor
from torch.nn.functional import cross_entropy

from .measure import DEVICE, REHEARSE, milliseconds, peak_gib, tried

SUPPORT = 32
SHAPES = [(4096, 151_936, 896), (4096, 151_936, 4096), (8192, 49_152, 576)]
if REHEARSE:
    SHAPES = [(256, 1_000, 64)]


def loss() -> None:
    """Forward and backward of the loss alone."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows, vocabulary, width in SHAPES if dtype == torch.bfloat16 else SHAPES[:1]:
            name = f"{rows} x {vocabulary} x {width}, weights {str(dtype)[6:]}"
            loss_of_shape(name, rows, vocabulary, width, dtype)


def loss_of_shape(name: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=dtype).mul_(0.02).requires_grad_()
    targets = loss_targets(rows, vocabulary)
    soft = Objective(choose("sft+kl"), "student", "base")
    live = Objective(choose("target-sft", "live"), "student", "base")
    dense: Any = lambda: cross_entropy((hidden @ weight.T).float(), targets.observed_ids)  # noqa: E731
    ways: dict[str, Callable[[], Tensor]] = {
        "dense, observed tokens": dense,
        "dense, compiled": torch.compile(dense),
        "qpipe sft+kl": lambda: fused_loss(hidden, Head(weight), targets, soft).sum,
        "qpipe target-sft, live": lambda: fused_loss(hidden, Head(weight), targets, live).sum,
        "qpipe sft+kl, gradient scaled": lambda: (
            0.5 * fused_loss(hidden, Head(weight), targets, soft).sum
        ),
        "qpipe sft+kl, passes of torch": partial(in_torch, hidden, weight, targets, soft),
    }
    for size in (1024, 2048, 4096, rows):
        ways[f"qpipe sft+kl, {size} rows"] = partial(in_rows, size, hidden, weight, targets, soft)
    ways |= rivals(hidden, weight, targets)
    for way, value in ways.items():
        tried("loss", f"{name}: {way}", partial(loss_row, value, hidden, weight))


def rivals(
    hidden: Tensor, weight: Tensor, targets: SparseTargets
) -> dict[str, Callable[[], Tensor]]:
    """Other libraries' fused losses of the observed tokens, where they are installed."""

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        found = LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets.observed_ids)
        return found[0] if isinstance(found, tuple) else found

    def cut() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets.observed_ids)

    return {"Liger, observed tokens": liger, "cut cross-entropy, observed tokens": cut}


def loss_row(value: Callable[[], Tensor], hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    def work() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=hidden.dtype == torch.float32):
            result = value()
        result.backward()

    work()
    hidden.grad = weight.grad = None
    own = sum(each.numel() * each.element_size() for each in (hidden, weight)) / 2**30
    gib = peak_gib(work)
    return {"ms": round(milliseconds(work), 2), "GiB beyond gradients": round(gib - own, 2)}


def in_torch(
    hidden: Tensor, weight: Tensor, targets: SparseTargets, objective: Objective
) -> Tensor:
    """Without the kernels: chunks by passes of torch."""
    saved = chunk_in_kernels.has_kernels
    try:
        chunk_in_kernels.has_kernels = lambda *_: False
        return fused_loss(hidden, Head(weight), targets, objective).sum
    finally:
        chunk_in_kernels.has_kernels = saved


def in_rows(
    size: int, hidden: Tensor, weight: Tensor, targets: SparseTargets, objective: Objective
) -> Tensor:
    """With chunks of so many rows."""
    saved = fused.even_chunks
    count = len(hidden)
    try:
        fused.even_chunks = lambda *_: iter(
            [slice(start, min(start + size, count)) for start in range(0, count, size)]
        )
        return fused_loss(hidden, Head(weight), targets, objective).sum
    finally:
        fused.even_chunks = saved


def loss_targets(rows: int, vocabulary: int) -> SparseTargets:
    """Random targets; the ids of a row are from as many parts of the vocabulary."""
    part = vocabulary // SUPPORT
    starts = part * torch.arange(SUPPORT, device=DEVICE)
    ids = torch.randint(0, part, (rows, SUPPORT), device=DEVICE) + starts
    probs = torch.rand(rows, SUPPORT, device=DEVICE) + 0.01
    tail = torch.rand(rows, device=DEVICE)
    total = probs.sum(1) + tail
    return SparseTargets(
        observed_ids=ids[:, 0].contiguous(),
        example_of=torch.zeros_like(ids[:, 0]),
        trust=torch.rand(rows, device=DEVICE),
        weights=torch.full((rows,), 1 / rows, device=DEVICE),
        support_ids=ids,
        support_mask=torch.ones_like(ids, dtype=torch.bool),
        support_probs=probs / total[:, None],
        tail_mass=tail / total,
    )


def products() -> None:
    """The parts of the loss: the three products and the kernel at some block sizes."""
    rows, vocabulary, width = SHAPES[0]
    for size in (min(rows, each) for each in (1408, 2048, 4096)):
        tried(
            "products", f"{size} x {vocabulary} x {width}", partial(parts, size, vocabulary, width)
        )


def parts(rows: int, vocabulary: int, width: int) -> dict[str, Any]:
    from qpipe.trainer.loss import kernels

    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    head = Head(torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16))
    scores = head.empty_scores(rows)
    scores_nV = head.write_scores(hidden, scores)
    total = torch.zeros(vocabulary, width, device=DEVICE)
    targets = loss_targets(rows, vocabulary)
    mass, tail = chunk_in_torch.masses(targets, vocabulary)
    given = targets.support_ids, targets.support_mask, mass, tail, targets.weights
    works: dict[str, Callable[[], Any]] = {
        "logits": lambda: head.write_scores(hidden, scores),
        "dH": lambda: scores_nV @ head.weight,
        "dW added in float32": lambda: fused.add_product(total, scores_nV.T, hidden, torch.float32),
        "summary": lambda: kernels.summarise(scores, head, *given[:2]),
    }
    for block, warps in ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)):
        options = {"block": block, "warps": warps}
        works[f"kernel {block}/{warps}"] = partial(
            kernels.loss_and_gradient_, scores, head, *given, **options
        )
    found = {name: round(milliseconds(work), 3) for name, work in works.items()}
    best = min(value for name, value in found.items() if name.startswith("kernel"))
    return found | {"TB/s of the best": round(6 * rows * vocabulary / best / 1e9, 2)}
