"""Loss and gradients of every method, and packed attention, against truth."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.methods.table import choose
from qpipe.tests.support.losses import (
    CHOICES,
    HEADS,
    objective_of,
    random_head,
    random_targets,
    run,
    to_dtype,
)
from qpipe.trainer.data.batch import Batch, packed_batch, padded_batch
from qpipe.trainer.loss import chunk_in_kernels
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.student import Student
from torch import Tensor

from .measure import DEVICE, tried
from .work import make_examples, make_model


def right() -> None:
    """Loss and gradients of every method, and packed attention, against truth."""
    tried("right", "every method, float32", partial(every_method, torch.float32))
    tried("right", "every method, bfloat16", partial(every_method, torch.bfloat16))
    for window in (None, 5):
        for shared in (0, 7):
            name = f"packed attention, window {window}, {shared} tokens in common"
            tried("right", name, partial(packed_is_padded, window, shared))


def every_method(dtype: torch.dtype) -> dict[str, Any]:
    """The largest error of loss and gradients, as a share of the largest value."""
    worst = {"loss": 0.0, "gradient": 0.0}
    in_kernels = 0
    for choice in CHOICES:
        for form in HEADS.values():
            hidden, head = random_head(**form)
            hidden, weight = hidden.to(dtype).double(), head.weight.to(dtype).double()
            bias = None if head.bias is None else head.bias.to(dtype).double()
            head = replace(head, weight=weight, bias=bias)
            targets, objective = random_targets(choice), objective_of(choice)
            truth = run(lambda h, head: objective(head.logits(h), targets), hidden, head, torch.float64)  # noqa: B023, E501  # fmt: skip
            given = to_dtype(targets, torch.float32).to(DEVICE)
            there = replace(head, weight=weight.to(DEVICE), bias=None if bias is None else bias.to(DEVICE))  # noqa: E501  # fmt: skip
            found = run(lambda h, head: fused_loss(h, head, given, objective), hidden.to(DEVICE), there, dtype)  # noqa: B023, E501  # fmt: skip
            live = choice if choice.reads_student else None
            in_kernels += chunk_in_kernels.has_kernels(DEVICE, dtype, live)
            worst["loss"] = max(worst["loss"], off(found[0].sum, truth[0].sum))
            errors = [off(own, exact) for own, exact in zip(found[1], truth[1], strict=True)]
            worst["gradient"] = max(worst["gradient"], *errors)
    return {key: f"{value:.1e}" for key, value in worst.items()} | {"in_kernels": in_kernels}


def off(found: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    return float((found.detach().cpu().double() - exact).abs().max() / exact.abs().max())


def packed_is_padded(window: int | None, shared: int) -> dict[str, Any]:
    """Loss and gradients of a pack in bfloat16 and of its examples padded in float32."""
    examples = make_examples(6, np.random.default_rng(0), shared)
    errors = {}
    model = make_model("0.6B", layers=2, window=window).float().to(DEVICE)
    student = Student(model).train()
    objective = Objective(choose("sft+kl"), "student", "base")

    def gradients(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        student.zero_grad()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss, _ = student(batch.to(DEVICE), objective)
        loss.backward()
        grads = {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    truth = gradients(padded_batch(examples), torch.float32)
    half = gradients(padded_batch(examples), torch.bfloat16)
    assert can_pack(model)
    packed = gradients(packed_batch(examples), torch.bfloat16)
    for name, found in (("packed", packed), ("padded", half)):
        norms = [
            float((found[1][k] - exact).norm() / exact.norm()) for k, exact in truth[1].items()
        ]
        errors[name] = (
            f"loss {off(found[0], truth[0].cpu().double()):.1e}, gradients {max(norms):.1e}"
        )
    return errors
