"""The trainer on a GPU: is it right, what the loss takes, what a whole step takes.

    python tests/gpu/trainer.py [--rehearse] [PART ...]

Parts are `right`, `loss`, `products`, `step-0.6B`, `step-1.7B` and `trace`; without names all run,
in this order. Each reports its failures and lets the next run. With --rehearse everything is small
and runs anywhere: it shows that the script works, not how fast. Results are lines of JSON in
$OUT/trainer.jsonl, or in the present folder.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods.table import choose
from qpipe.pipeline.threads import Prefetch
from qpipe.tests.support.losses import (
    CHOICES,
    HEADS,
    objective_of,
    random_head,
    random_targets,
    run,
    to_dtype,
)
from qpipe.trainer.data.batch import Batch, SparseTargets, packed_batch, padded_batch
from qpipe.trainer.data.segments import segments_of
from qpipe.trainer.loss import chunk_in_kernels, chunk_in_torch, fused
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.compiling import compile_layers
from qpipe.trainer.models.student import Student
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.ahead import on_device
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.step import Stepper
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import Qwen3Config, Qwen3ForCausalLM

REHEARSE = "--rehearse" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUT = Path(os.environ.get("OUT", "."))
PEAK = 989e12  # dense bfloat16 operations a second of an H100 or H200, from its data sheet
SUPPORT = 32
BEGAN = time.time()

SHAPES = [(4096, 151_936, 896), (4096, 151_936, 4096), (8192, 49_152, 576)]
QWEN = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
LAYERS, PACK, MEAN_LENGTH, VOCABULARY = 28, 8192, 500, 151_936
if REHEARSE:
    SHAPES = [(256, 1_000, 64)]
    QWEN = {name: {"hidden_size": 64, "intermediate_size": 128} for name in QWEN}
    LAYERS, PACK, MEAN_LENGTH, VOCABULARY = 2, 256, 40, 1_000


def report(**row: Any) -> None:
    """Print a result and keep it."""
    print(f"[{time.time() - BEGAN:5.0f} s]", *(f"{k}={v}" for k, v in row.items()), flush=True)
    with (OUT / "trainer.jsonl").open("a") as file:
        print(json.dumps(row), file=file)


def tried(part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Report what `work` finds, or how it fails."""
    try:
        row = work()
    except Exception as error:
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    report(part=part, name=name, **row)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], runs: int = 7) -> float:
    """The median time of some runs, after three that warm up."""
    times = []
    for _ in range(3 + runs):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[3:])


def peak_gib(work: Callable[[], Any]) -> float:
    """Memory that the work takes at its peak, beyond what is there before."""
    if DEVICE.type != "cuda":
        work()
        return 0.0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# ---- right


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


# ---- loss


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


# ---- products


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


# ---- step


def make_model(size: str, layers: int = LAYERS, window: int | None = None) -> Any:
    """A random model of real dimensions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **QWEN[size],
        num_hidden_layers=layers,
        num_attention_heads=16 if not REHEARSE else 4,
        num_key_value_heads=8 if not REHEARSE else 2,
        head_dim=128 if not REHEARSE else 16,
        vocab_size=VOCABULARY,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
    )
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config)


def make_examples(count: int, rng: np.random.Generator, shared: int = 0) -> list[TargetExample]:
    """Chats of log-normal lengths, of which the last half is supervised."""
    beginning = rng.integers(0, VOCABULARY, shared)
    made = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.2, 0.6), 16, PACK // 2))
        positions = np.arange(max(shared, length // 2) + 1, max(shared, length // 2) + length // 2)
        size = int(positions[-1]) + 1
        ids = np.concatenate([beginning, rng.integers(0, VOCABULARY, size - shared)])
        part = VOCABULARY // SUPPORT
        support = rng.integers(0, part, (len(positions), SUPPORT)) + part * np.arange(SUPPORT)
        observed = ids[positions]
        support[np.arange(len(positions)), observed // part % SUPPORT] = observed
        probs = rng.random(support.shape) + 0.01
        probs *= 0.9 / probs.sum(1, keepdims=True)
        ones = np.ones(len(positions), np.float32)
        made.append(
            TargetExample(
                id=str(number),
                input_ids=ids.astype(np.int32),
                positions=positions.astype(np.int32),
                trust=0.5 * ones,
                counts=np.full(len(positions), SUPPORT, np.int32),
                support_ids=support.ravel().astype(np.int32),
                support_probs=probs.ravel().astype(np.float32),
                tail_mass=0.1 * ones,
                weights=ones,
            )
        )
    return made


def make_steps(count: int) -> list[list[TargetExample]]:
    """The examples of some steps, at most one full pack each."""
    rng = np.random.default_rng(1)
    steps = []
    for _ in range(count):
        examples, total = [], 0
        for each in make_examples(PACK // 16, rng):
            if total + len(each.input_ids) > PACK:
                break
            examples.append(each)
            total += len(each.input_ids)
        steps.append(examples)
    return steps


def step(size: str) -> None:
    """Whole optimizer steps, ours and others', on the same examples."""
    steps = make_steps(4)
    tokens = sum(len(each.input_ids) for examples in steps for each in examples) / len(steps)
    supervised = sum(len(each.positions) for examples in steps for each in examples) / len(steps)
    body = make_model(size)
    weights = sum(p.numel() for p in body.parameters()) - VOCABULARY * QWEN[size]["hidden_size"]
    del body
    operations = 6 * weights * tokens + 6 * VOCABULARY * QWEN[size]["hidden_size"] * supervised
    facts = {"tokens": tokens, "operations": operations}
    report(part="step", name=size, tokens=tokens, supervised=supervised, weights_of_layers=weights)
    plain = partial(their_steps, size, steps)
    ways: dict[str, Callable[[], Iterator[float]]] = {
        "qpipe sft+kl": partial(our_steps, size, steps, "sft+kl"),
        "qpipe sft+kl --compile": partial(our_steps, size, steps, "sft+kl", compiled=True),
        "plain SFT, packed, flash attention, Liger": partial(plain, "flash", liger=True),
        "plain SFT, packed, sdpa, Liger": partial(plain, "packed", liger=True),
        "plain SFT, packed, flash attention": partial(plain, "flash", liger=False),
        "plain SFT, padded, sdpa": partial(plain, "padded", liger=False),
        "on-line distillation, padded": partial(online_steps, size, steps),
        "qpipe target-sft, live --compile": partial(
            our_steps, size, steps, "target-sft", compiled=True
        ),
    }
    for name, times in ways.items():
        row = partial(step_row, times, facts)
        # Liger patches transformers for good
        tried("step", f"{size}: {name}", partial(in_own_process, row) if "Liger" in name else row)


def in_own_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work).result()


def step_row(times: Callable[[], Iterator[float]], facts: dict[str, float]) -> dict[str, Any]:
    found: list[float] = []

    def work() -> None:
        found.extend(times())

    gib = peak_gib(work)
    seconds = median(found)
    return {
        "ms": round(1e3 * seconds, 1),
        "tokens/s": round(facts["tokens"] / seconds),
        "MFU": round(facts["operations"] / seconds / PEAK, 3),
        "GiB": round(gib, 1),
        "steps": [round(1e3 * each, 1) for each in found],
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
) -> Iterator[float]:
    """Steps of this trainer, its batches copied ahead as in `qpipe train`."""
    stepper = our_stepper(size, method, compiled)
    batches = [packed_batch(examples) for examples in steps]
    made = on_device(((n, [batch]) for n in range(rounds) for batch in batches), DEVICE)
    with Prefetch(made, 2) as ready:
        for number, (_, group) in enumerate(ready):
            synchronize()
            start = time.perf_counter()
            stepper.step(number + 1, group, 1e-6)
            synchronize()
            if number >= len(steps):  # the first round warms up, and compiles
                yield time.perf_counter() - start


def their_steps(
    size: str, steps: list[list[TargetExample]], kind: str, liger: bool, rounds: int = 3
) -> Iterator[float]:
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
            yield time.perf_counter() - start


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


def online_steps(size: str, steps: list[list[TargetExample]], rounds: int = 2) -> Iterator[float]:
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
            yield time.perf_counter() - start


def half() -> Any:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if DEVICE.type == "cuda" else nullcontext()


def take(model: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- trace


def trace() -> None:
    """One step under the profiler: waits of the host, kernels by time; the trace is kept."""
    for compiled in (True, False):
        tried("trace", "compiled" if compiled else "eager", partial(traced_step, compiled))


def traced_step(compiled: bool) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    stepper = our_stepper("0.6B", "sft+kl", compiled)
    batches = [packed_batch(examples) for examples in make_steps(2)]
    for number in range(6):
        stepper.step(number + 1, [batches[number % 2].to(DEVICE)], 1e-6)
    ready = batches[0].to(DEVICE)
    synchronize()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []
    with profile(activities=activities) as profiled:
        stepper.step(7, [ready], 1e-6)
        synchronize()
    events = profiled.key_averages()
    waits = {
        event.key: event.count
        for event in events
        if "Synchronize" in event.key or event.key in ("aten::item", "aten::_local_scalar_dense")
    }
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)[:14]
    for event in kernels:
        print(
            f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:5} x {event.key[:90]}"
        )
    profiled.export_chrome_trace(str(OUT / f"step-{'compiled' if compiled else 'eager'}.json.gz"))
    total = sum(event.self_device_time_total for event in events) / 1e3
    return {"waits": waits, "GPU ms": round(total, 1)}


PARTS: dict[str, Callable[[], None]] = {
    "right": right,
    "loss": loss,
    "products": products,
    "step-0.6B": partial(step, "0.6B"),
    "trace": trace,
    "step-1.7B": partial(step, "1.7B"),
}


def main() -> None:
    """Run the parts that are named, or all."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    report(part="machine", card=card, torch=torch.__version__)
    for name in [each for each in sys.argv[1:] if each in PARTS] or PARTS:
        try:
            PARTS[name]()
        except Exception as error:
            traceback.print_exc()
            report(part=name, failed=f"{type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    main()
