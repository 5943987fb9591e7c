"""Whole optimizer steps, ours and others', on the same examples."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods.table import choose
from qpipe.pipeline.threads import Prefetch
from qpipe.trainer.data.batch import packed_batch
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.compiling import compile_layers
from qpipe.trainer.models.student import Student
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.ahead import on_device
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.step import Stepper

from .bare_loops import online_steps, their_steps
from .measure import DEVICE, peak_gib, report, synchronize, tried
from .trainers import trainer_steps
from .work import SIZES, VOCABULARY, Times, make_model, make_steps, tokens_of

Steps = Callable[[], Times]
PEAK = 989e12  # dense bfloat16 operations a second of an H100 or H200, from its data sheet


def step(size: str) -> None:
    """Whole optimizer steps, ours and others', on the same examples."""
    steps = make_steps(4)
    tokens = sum(map(tokens_of, steps)) / len(steps)
    supervised = sum(len(each.positions) for examples in steps for each in examples) / len(steps)
    body = make_model(size)
    weights = sum(p.numel() for p in body.parameters()) - VOCABULARY * SIZES[size]["hidden_size"]
    del body
    operations = 6 * weights * tokens + 6 * VOCABULARY * SIZES[size]["hidden_size"] * supervised
    report(part="step", name=size, tokens=tokens, supervised=supervised, weights_of_layers=weights)
    bare = partial(their_steps, size, steps)
    others = partial(trainer_steps, size, steps)
    ours = partial(our_steps, size, steps)
    ways: dict[str, Steps] = {
        "qpipe sft+kl": partial(ours, "sft+kl"),
        "qpipe sft+kl --compile": partial(ours, "sft+kl", compiled=True),
        "TRL's SFTTrainer, plain SFT, packed, flash attention, Liger": partial(others, "trl"),
        "transformers.Trainer, plain SFT, packed, flash attention": partial(others, "packed"),
        "transformers.Trainer, plain SFT, padded, sdpa": partial(others, "padded"),
        "bare loop, plain SFT, packed, flash attention, Liger": partial(bare, "flash", liger=True),
        "on-line distillation, padded": partial(online_steps, size, steps),
        "qpipe target-sft, live --compile": partial(ours, "target-sft", compiled=True),
        "bare loop, plain SFT, padded, sdpa": partial(bare, "padded", liger=False),
    }
    for name, times in ways.items():
        row = partial(step_row, times, operations / tokens)
        # Liger patches transformers for good
        tried("step", f"{size}: {name}", partial(in_own_process, row) if "Liger" in name else row)


def in_own_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work).result()


def step_row(steps: Steps, operations: float) -> dict[str, Any]:
    """Medians over the steps; `operations` is the number that a token takes."""
    found: list[tuple[int, float]] = []

    def work() -> None:
        found.extend(steps())

    gib = peak_gib(work)
    rate = median(tokens / seconds for tokens, seconds in found)
    return {
        "ms": round(1e3 * median(seconds for _, seconds in found), 1),
        "tokens/s": round(rate),
        "MFU": round(rate * operations / PEAK, 3),
        "GiB": round(gib, 1),
        "steps": [round(1e3 * seconds, 1) for _, seconds in found],
    }


def our_stepper(size: str, method: str, compiled: bool) -> Stepper:
    settings = TrainSettings(targets=Path("."), model="", out=Path("."))
    student = Student(make_model(size)).train()
    assert can_pack(student.model)
    if compiled:
        compile_layers(student.model)
    form = {"target-sft": "live"}.get(method)
    choice = choose(method, form) if form else choose(method)  # pyright: ignore
    precision = "bfloat16" if DEVICE.type == "cuda" else "float32"
    return Stepper(
        start_accelerator(precision), student, settings, Objective(choice, "student", "base")
    )


def our_steps(
    size: str,
    steps: list[list[TargetExample]],
    method: str,
    compiled: bool = False,
    rounds: int = 3,
) -> Times:
    """Tokens and seconds of steps of this trainer, its batches copied ahead as in `qpipe train`."""
    stepper = our_stepper(size, method, compiled)
    batches = [packed_batch(examples) for examples in steps]
    made = on_device(((n, [batch]) for n in range(rounds) for batch in batches), DEVICE)
    with Prefetch(made, 2) as ready:
        for number, (_, group) in enumerate(ready):
            synchronize()
            start = time.perf_counter()
            stepper.step(number + 1, group, 1e-6)
            synchronize()
            seconds = time.perf_counter() - start
            if number >= len(steps):  # the first round warms up, and compiles
                yield tokens_of(steps[number % len(steps)]), seconds
