"""Supervised rows on a GPU: their kernels, and what makes the scores of two runs differ.

An engine puts the tokens of its requests into steps as they arrive, so that two runs may cut a
prompt at other tokens and multiply other numbers of rows at a time, whose sums are rounded
differently. `steps_apart` records the steps of each run and compares scores that were computed in
equal steps apart from the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from .models import with_weights
from .parts import Bench, Part, Row
from .scoring import TOP_K, dense_log_probs, forms, start_scorer, told

_ROWS, _TURNS = 1024, 20
_SWEEP = [(2048, 4), (2048, 8), (4096, 8), (8192, 16)]
_SELECTS = [(256, 2), (512, 4), (1024, 4)]
_EXAMPLES, _MANY = 24, 400


def kernels_alone(bench: Bench) -> Iterator[Row]:
    """Rows of logits to log-probabilities, by each way: time, memory, and truth."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    V = 3000 if bench.rehearse else 151936
    for dtype in (torch.bfloat16, torch.float32):
        for n in (64,) if bench.rehearse else (_ROWS, 300):
            logits_nV = (6 * torch.randn(n, V, device=device)).to(dtype)
            asked = torch.randint(0, V, (n,), device=device), torch.empty(n, 0, device=device)
            name = f"{n} rows, {dtype}".replace("torch.", "")
            for way, run in ways(logits_nV, asked[0], asked[1].long()).items():
                yield from attempted(f"{name}: {way}", partial(timed, run, logits_nV))
            if n != 300:
                yield from attempted(f"{name}: truth", partial(truth, logits_nV, asked[0]))


def ways(logits_nV: Any, observed_n: Any, given_nw: Any) -> dict[str, Callable[[], Any]]:
    """The ways to the log-probabilities of rows, and the kernels with other sizes."""
    from qpipe.stages.engines.supervised_rows import gather, shards, summary

    asked = logits_nV, observed_n, given_nw, TOP_K
    found: dict[str, Callable[[], Any]] = {
        "kernels": partial(shards.whole_log_probs, *asked),
        "vLLM's kernels": partial(gather.triton_log_probs, *asked),
        "torch": partial(gather.gathered_log_probs, *asked),
        "a sum of all logits": partial(logits_nV.sum, dim=1),  # what one read takes
    }
    if summary.has_kernels(logits_nV, TOP_K):
        from qpipe.stages.engines.supervised_rows import kernels

        alone = partial(kernels.summarise, logits_nV, observed_n.float(), TOP_K)
        for block, warps in _SWEEP:
            found[f"kernels, blocks {block}/{warps}"] = partial(alone, block=block, warps=warps)
        for chunk, warps in _SELECTS:
            found[f"kernels, chunks {chunk}/{warps}"] = partial(
                alone, chunk=chunk, select_warps=warps
            )
    return found


def timed(run: Callable[[], Any], logits_nV: Any) -> Iterator[tuple[float, str, str]]:
    """Milliseconds of a call, as (value, unit, beside) with reads a second and memory."""
    import torch

    run()  # compiles
    if not logits_nV.is_cuda:
        begun = time.perf_counter()
        run()
        yield 1e3 * (time.perf_counter() - begun), "ms", "on a CPU"
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_TURNS):
        run()
    end.record()
    end.synchronize()
    ms = start.elapsed_time(end) / _TURNS
    read = logits_nV.numel() * logits_nV.element_size() / ms / 1e9
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    yield ms, "ms", f"one read at {read:.2f} TB/s, {gib:.3f} GiB"


def truth(logits_nV: Any, observed_n: Any) -> Iterator[tuple[float, str, str]]:
    """The largest error of the kernels against float64, and whether ids and ranks are right."""
    import torch
    from qpipe.stages.engines.supervised_rows.shards import whole_log_probs

    logits_nV, observed_n = logits_nV[:64], observed_n[:64]
    found = whole_log_probs(logits_nV, observed_n, observed_n[:, None], TOP_K)
    dense_nV = logits_nV.double().log_softmax(1)
    own_n1 = dense_nV.gather(1, observed_n[:, None])
    top_nV = logits_nV.sort(dim=1, descending=True, stable=True)
    errors = [
        (found.observed_n - own_n1[:, 0]).abs().max(),
        (found.given_nw - own_n1).abs().max(),
        (found.top_nk - dense_nV.gather(1, found.ids_nk.long())).abs().max(),
    ]
    ids_nk, most_nk = found.ids_nk.long(), top_nV.values[:, :TOP_K]
    ids = bool((logits_nV.gather(1, ids_nk) == most_nk).all())  # equal logits in any order
    ids &= all(len(row.unique()) == TOP_K for row in ids_nk)
    ranks = bool((found.ranks_n == (dense_nV >= own_n1).sum(1)).all())
    yield float(torch.stack(errors).max()), "nats", f"ids right: {ids}, ranks right: {ranks}"


def attempted(what: str, run: Callable[[], Iterator[tuple[float, str, str]]]) -> Iterator[Row]:
    """Rows of a measurement, or why it failed."""
    try:
        for value, unit, beside in run():
            yield Row(what, value, unit, beside)
    except Exception as error:  # the next measurement may do
        yield Row(what, f"{type(error).__name__}: {error}".splitlines()[0][:200])


def steps_apart(bench: Bench, **overrides: Any) -> Iterator[Row]:
    """Which differences between runs come from their steps, and how far each is from truth."""
    model = with_weights(bench, "0.6B")
    scorer, seconds = start_scorer(model, {"load_format": "auto"} | overrides)
    yield Row("start of the engine", seconds, "s")
    scheduler = scorer.engine.vllm_config.scheduler_config
    yield Row("tokens of a step", scheduler.max_num_batched_tokens)
    of_scoring = {form: can for form, can in forms(scorer).items() if can is not None}
    rows = of_scoring.get("supervised rows")
    if rows is None:
        yield Row("supervised rows alone", "this engine cannot")
        return
    scorer.llm.collective_rpc(record_steps)
    examples = random_examples(6 if bench.rehearse else _EXAMPLES)
    every = of_scoring["every row"]
    runs = {"every row": every, "every row again": every, "rows": rows, "rows again": rows}
    found = {name: run(scorer, can, examples) for name, can in runs.items()}
    if scorer.llm.collective_rpc(use_plain)[0]:
        found["rows by vLLM's kernels"] = run(scorer, rows, examples)
    scorer.llm.collective_rpc(use_kernels)
    for one, other in [*pairwise(found), ("every row", "rows")]:
        yield from compared_runs(f"{one}, {other}", examples, found[one], found[other])
    for name, can in {"every row": every, "rows": rows}.items():
        found[f"{name}, one at a time"] = one_at_a_time(scorer, can, examples)
    alone = "every row, one at a time", "rows, one at a time"
    yield from compared_runs("one at a time", examples, *(found[each] for each in alone))
    yield from speeds_of_rows(bench, scorer, every, rows)
    yield from against_truth(model, examples, found)


def random_examples(count: int) -> list[Any]:
    """Examples of random tokens, of which 40 % are supervised, in turns."""
    import numpy as np
    from qpipe.tests.support.examples import unweighted

    rng, examples = np.random.default_rng(3), []
    for n in range(count):
        ids = rng.integers(0, 40000, rng.integers(150, 900)).astype(np.int32)
        positions = np.flatnonzero(np.arange(len(ids)) % 50 >= 30).astype(np.int32)
        examples.append(unweighted(f"{n}", ids, positions))
    return examples


def run(scorer: Any, can: Any, examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The scores of a run in the order of the examples, and for each the steps that made it."""
    can = replace(can, block_size=0)
    first = scorer.submitted
    scorer.llm.collective_rpc(taken_steps)
    scores = dict(told(scorer, can).score(examples, TOP_K))
    (steps,) = scorer.llm.collective_rpc(taken_steps)[:1]
    of_example: list[list[tuple[int, int, int, int]]] = [[] for _ in examples]
    for spans in steps:
        total = sum(tokens for _, _, _, tokens in spans)
        for name, offset, start, tokens in spans:
            place = int(name.split("-")[0]) - first
            if 0 <= place < len(examples):
                of_example[place].append((start, tokens, offset, total))
    return [scores[place] for place in range(len(examples))], of_example


def one_at_a_time(scorer: Any, can: Any, examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Each example in steps of its own."""
    runs = [run(scorer, can, [example]) for example in examples]
    return [scores[0] for scores, _ in runs], [steps[0] for _, steps in runs]


def compared_runs(name: str, examples: Sequence[Any], one: Any, other: Any) -> Iterator[Row]:
    """The largest differences of two runs, of examples in equal steps and of the others."""
    import numpy as np

    groups: dict[str, list[tuple[float, str]]] = {"equal": [], "other": []}
    pairs = zip(examples, one[0], other[0], one[1], other[1], strict=True)
    for example, a, b, steps, others in pairs:
        observed = np.abs(a.observed_log_probs - b.observed_log_probs)
        top = np.abs(a.topk_log_probs - b.topk_log_probs).reshape(len(observed), -1).max(1)
        largest = np.maximum(observed, top)
        at = int(largest.argmax())
        where = (
            f"row {example.positions[at] - 1} of {len(example.input_ids)}, steps {steps} {others}"
        )
        groups["equal" if steps == others else "other"].append((float(largest[at]), where))
    for kind, found in groups.items():
        if found:
            value, where = max(found)
            beside = f"{len(found)} examples" + (f"; {where}" if value else "")
            yield Row(f"{name}: in {kind} steps, largest difference", value, "nats", beside)


def against_truth(model: Any, examples: Sequence[Any], found: dict[str, Any]) -> Iterator[Row]:
    """The errors of each run against dense log-probabilities in float32."""
    import numpy as np

    rows_of = dense_log_probs(model)
    dense = [rows_of(example) for example in examples]
    for name, (scores, _) in found.items():
        errors = []
        for score, log_probs_NV in zip(scores, dense, strict=True):
            N = np.arange(len(log_probs_NV))
            own = log_probs_NV[N, score.input_ids[score.positions]] - score.observed_log_probs
            ids_Nk = score.topk_ids.reshape(len(N), -1)
            top = np.take_along_axis(log_probs_NV, ids_Nk, 1).ravel() - score.topk_log_probs
            errors.append(np.abs(np.concatenate((own, top))))
        of_all = np.concatenate(errors)
        beside = f"99.9 %: {np.quantile(of_all, 0.999):.2g}, largest {of_all.max():.2g}"
        yield Row(f"{name}: error against float32, mean", float(of_all.mean()), "nats", beside)


def speeds_of_rows(bench: Bench, scorer: Any, every: Any, rows: Any) -> Iterator[Row]:
    """Tokens a second of the engine alone, and the time that its thread spends on rows."""
    examples = random_examples(6 if bench.rehearse else _MANY)
    tokens = sum(len(example.input_ids) for example in examples)
    kinds = {"every row": (every, use_kernels), "rows by the kernels": (rows, use_kernels),
             "rows by vLLM's kernels": (rows, use_plain)}  # fmt: skip
    for turn in range(2):
        for name, (can, choose) in kinds.items():
            scorer.llm.collective_rpc(choose)
            scorer.llm.collective_rpc(taken_seconds)
            begun = time.perf_counter()
            list(told(scorer, replace(can, block_size=0)).score(examples, TOP_K))
            seconds = time.perf_counter() - begun
            inside, steps = scorer.llm.collective_rpc(taken_seconds)[0]
            beside = f"{steps} steps, {1e3 * inside / max(1, steps):.2f} ms of the thread for rows"
            yield Row(f"{name}, turn {turn + 1}", tokens / seconds, "tokens/s", beside)
    scorer.llm.collective_rpc(use_kernels)


def rows_object(worker: Any) -> Any:
    """In the engine's process: what computes supervised rows."""
    runner = worker.model_runner
    own = getattr(runner, "prompt_logprobs_worker", None) or runner._get_prompt_logprobs_dict
    return own.rows


def record_steps(worker: Any) -> None:
    """In the engine's process: keep the tokens of each step and the seconds on rows."""
    rows = rows_object(worker)
    step, worker.qpipe_steps, worker.qpipe_seconds = rows.step, [], []

    def recording(hidden: Any, spans: Any) -> Any:
        spans = list(spans)
        worker.qpipe_steps.append([(s.request, s.offset, s.start, s.tokens) for s in spans])
        begun = time.perf_counter()
        found = step(hidden, spans)
        worker.qpipe_seconds.append(time.perf_counter() - begun)
        return found

    rows.step, worker.qpipe_log_probs = recording, rows.log_probs


def taken_steps(worker: Any) -> list[Any]:
    """In the engine's process: the steps since the last call."""
    taken, worker.qpipe_steps = worker.qpipe_steps, []
    return taken


def taken_seconds(worker: Any) -> tuple[float, int]:
    """In the engine's process: the seconds on rows since the last call, and the steps."""
    taken, worker.qpipe_seconds = worker.qpipe_seconds, []
    return sum(taken), len(taken)


def use_plain(worker: Any) -> bool:
    """In the engine's process: rows without the kernels; whether there are others."""
    import torch
    from qpipe.stages.engines.supervised_rows.gather import triton_log_probs

    def plain(hidden: Any, *asked: Any) -> Any:
        return triton_log_probs(worker.model_runner.model.compute_logits(hidden), *asked)

    if torch.cuda.is_available():
        rows_object(worker).log_probs = plain
    return torch.cuda.is_available()


def use_kernels(worker: Any) -> None:
    """In the engine's process: rows as the engine was started."""
    rows_object(worker).log_probs = worker.qpipe_log_probs


def _apart(**overrides: Any) -> Callable[[Bench], Iterator[Row]]:
    return partial(steps_apart, **overrides)


PARTS = {
    "rows": Part("the kernels of supervised rows", kernels_alone, 90),
    "apart-2048": Part(
        "what makes runs differ, with steps of 2,048 tokens",
        _apart(max_num_batched_tokens=2048),
        150,
    ),
    "apart-8192": Part("what makes runs differ, with steps of 8,192 tokens", _apart(), 130),
    "apart-16384": Part(
        "what makes runs differ, with steps of 16,384 tokens",
        _apart(max_num_batched_tokens=16384),
        130,
    ),
    "apart-compiled": Part(
        "what makes runs differ, compiled with CUDA graphs", _apart(enforce_eager=False), 170
    ),
}
