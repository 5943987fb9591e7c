"""Steps of transformers' model without a trainer around it: plain SFT, and on-line distillation."""

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.data.segments import segments_of
from qpipe.trainer.models.attention.packing import can_pack
from torch import Tensor
from torch.nn.functional import kl_div

from .measure import DEVICE, synchronize
from .work import Times, make_model, tokens_of


def their_steps(
    size: str, steps: list[list[TargetExample]], kind: str, liger: bool, rounds: int = 3
) -> Times:
    """Steps of transformers' model and loss, without a trainer around them.

    Packed, examples are kept apart by their position ids, as TRL's packing does it; with flash
    attention, for which torch's own stands in, by their lengths.
    """
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=True, cross_entropy=False)
    model = make_model(size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    inputs = [hard_inputs(examples, packed=kind != "padded") for examples in steps]
    extra: list[dict[str, Any]] = [{} for _ in steps]
    if kind == "flash":
        assert can_pack(model)
        lengths = [[0, *(len(each.input_ids) for each in examples)] for examples in steps]
        extra = [{"segments": segments_of(each).to(DEVICE)} for each in lengths]
    for number in range(rounds * len(steps)):
        synchronize()
        start = time.perf_counter()
        given = {name: value.to(DEVICE) for name, value in inputs[number % len(steps)].items()}
        with half():
            loss = model(**given, **extra[number % len(steps)], use_cache=False).loss
        loss.backward()
        take(model, optimizer)
        synchronize()
        if number >= len(steps):
            yield tokens_of(steps[number % len(steps)]), time.perf_counter() - start


def hard_inputs(examples: list[TargetExample], packed: bool) -> dict[str, Tensor]:
    """The observed tokens as labels; examples end to end, or padded."""
    lengths = [len(each.input_ids) for each in examples]
    rows = [0] * len(examples) if packed else range(len(examples))
    starts = np.cumsum([0, *lengths[:-1]]) if packed else [0] * len(examples)
    shape = (1, sum(lengths)) if packed else (len(examples), max(lengths))
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    places = torch.zeros(shape, dtype=torch.int64)
    for each, row, start, length in zip(examples, rows, starts, lengths, strict=True):
        ids = torch.from_numpy(each.input_ids.astype(np.int64))
        input_ids[row, start : start + length] = ids
        places[row, start : start + length] = torch.arange(length)
        positions = torch.from_numpy(each.positions.astype(np.int64))
        labels[row, start + positions] = ids[positions]
    given = {"input_ids": input_ids, "labels": labels}
    if packed:
        return given | {"position_ids": places}
    return given | {"attention_mask": torch.arange(shape[1]) < torch.tensor(lengths)[:, None]}


def online_steps(size: str, steps: list[list[TargetExample]], rounds: int = 2) -> Times:
    """A frozen copy in bfloat16 runs in the loop; the divergence at the supervised positions."""
    student, teacher = make_model(size).train(), make_model(size).bfloat16().eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    batches = [padded_batch(examples) for examples in steps]
    for number in range(rounds * len(steps)):
        synchronize()
        start = time.perf_counter()
        batch = batches[number % len(steps)].to(DEVICE)
        at = batch.rows, batch.columns
        with half():
            with torch.no_grad():
                wanted = teacher(**batch.inputs, use_cache=False).logits[at].float().log_softmax(-1)
            log_probs = student(**batch.inputs, use_cache=False).logits[at].float().log_softmax(-1)
        kl_div(log_probs, wanted, reduction="batchmean", log_target=True).backward()
        take(student, optimizer)
        synchronize()
        if number >= len(steps):
            yield tokens_of(steps[number % len(steps)]), time.perf_counter() - start


def half() -> Any:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if DEVICE.type == "cuda" else nullcontext()


def take(model: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
