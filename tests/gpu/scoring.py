"""Scoring on a GPU: whether it is right, what it takes, and how fast it is.

The speeds of a part come from one engine. It is asked, in turns, for bare prefill, for its own
prompt log-probabilities (`LLM.generate`), and for the scores of `qpipe score` in three forms: each
prompt row, supervised rows alone, and these with shared beginnings read from the cache.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from .chats import make_chats
from .models import randomize, with_weights, without_weights
from .parts import Bench, Part, Row

TOP_K, MAX_LENGTH = 64, 2048
_TURNS = 2
_CHATS = {"0.6B": 384, "8B": 128}


def alignment(bench: Bench, names: Sequence[str]) -> Iterator[Row]:
    """`qpipe score --engine vllm` as a command, against dense log-probabilities in float32."""
    chats = make_chats(bench.work / "few.jsonl", 4 if bench.rehearse else 24, shared=False)
    source, first = ("--demonstrations", f"{chats}"), bench.work / "scores-auto"
    runs: dict[str, tuple[int, Path, tuple[str, ...]]] = {
        "float32": (0, bench.work / "scores-float32", (*source, "--dtype", "float32")),
        "auto": (0, first, source),
        "--at": (1, bench.work / "scores-at", ("--at", f"{first}")),
    }
    for name in names:
        seed, out, words = runs[name]
        model = with_weights(bench, "0.6B", seed)
        try:
            seconds = score_command(model, out, *words)
        except subprocess.CalledProcessError as error:
            yield Row(f"{name}: the command failed", f"status {error.returncode}")
            continue
        yield Row(f"{name}: the whole command", seconds, "s")
        for row in compared(model, out):
            yield replace(row, what=f"{name}: {row.what}")


def score_command(model: Path, out: Path, *words: str) -> float:
    """Run `qpipe score`; the seconds that it took."""
    shutil.rmtree(out, ignore_errors=True)  # of an earlier call
    begun = time.perf_counter()
    command = [sys.executable, "-m", "qpipe.stages", "score", "--model", f"{model}"]
    command += ["--engine", "vllm", "--top-k", f"{TOP_K}", "--out", f"{out}", *words]
    if "--at" not in words:
        command += ["--max-length", f"{MAX_LENGTH}"]
    subprocess.run(command, check=True)
    return time.perf_counter() - begun


def compared(model: Path, scores: Path) -> Iterator[Row]:
    """A score folder against dense log-probabilities of transformers in float32."""
    import numpy as np
    from qpipe.pipeline.folders.sealed import read_scores

    rows_of = dense_log_probs(model)
    errors, at_errors, divergences, ranks, ties = [], [], [], [], []
    for example in read_scores(scores):
        log_probs_NV = rows_of(example)
        ids_N = example.input_ids[example.positions]
        N = np.arange(len(ids_N))
        observed_N = log_probs_NV[N, ids_N]
        errors.append(np.abs(observed_N - example.observed_log_probs))
        position_E = np.repeat(N, example.counts)
        expected_E = log_probs_NV[position_E, example.topk_ids]
        at_errors.append(np.abs(expected_E - example.topk_log_probs))
        terms_E = np.exp(expected_E) * (expected_E - example.topk_log_probs)
        divergences.append(np.bincount(position_E, terms_E, len(N)))
        ranks_N = (log_probs_NV >= observed_N[:, None]).sum(axis=1)
        ranks.append(np.abs(ranks_N - example.observed_ranks) / ranks_N)
        ties.append(np.diff(example.topk_log_probs) == 0)
    found = [np.concatenate(each) for each in (errors, at_errors, divergences, ranks, ties)]
    yield Row("supervised positions", len(found[0]))
    yield Row("error of log p of the observed token, mean", float(found[0].mean()), "nats")
    yield Row("error of log p of the observed token, largest", float(found[0].max()), "nats")
    yield Row("error of log p of the stored entries, mean", float(found[1].mean()), "nats")
    yield Row("error of log p of the stored entries, largest", float(found[1].max()), "nats")
    yield Row("KL on the stored entries, mean", float(found[2].mean()), "nats")
    yield Row("equal ranks of the observed token", 100 * float((found[3] == 0).mean()), "%")
    yield Row("difference of the rank, in parts of it, mean", 100 * float(found[3].mean()), "%")
    yield Row("entries that tie with the next", 100 * float(found[4].mean()), "%")


def dense_log_probs(model: Path) -> Callable[[Any], Any]:
    """A function from an example to the log-probabilities [N, V] of its supervised positions."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def rows_of(example: Any) -> Any:
        ids_1T = torch.from_numpy(example.input_ids).long()[None].to(device)
        rows = torch.from_numpy(example.positions).long().to(device) - 1
        return loaded(input_ids=ids_1T).logits[0, rows].log_softmax(dim=-1).cpu().numpy()

    return rows_of


def speeds(
    bench: Bench, size: str, beginnings: Sequence[str] = ("own", "shared"), **overrides: Any
) -> Iterator[Row]:
    """Tokens a second of the forms of scoring on one engine, and the memory that they take.

    `overrides` are parameters of `vllm.LLM`.
    """
    scorer, seconds = start_scorer(without_weights(bench, size), overrides)
    yield Row("start of the engine", seconds, "s")
    scorer.llm.apply_model(randomize)
    config = scorer.engine.vllm_config
    yield Row("tokens of a step", config.scheduler_config.max_num_batched_tokens)
    yield Row("model runner", "V2" if getattr(config, "use_v2_model_runner", False) else "V1")
    of_scoring = forms(scorer)
    yield Row("forms", ", ".join(form for form, can in of_scoring.items() if can is not None))
    count = 6 if bench.rehearse else _CHATS[size]
    for name in beginnings:
        chats = make_chats(bench.work / f"{name}-{size}.jsonl", count, shared=name == "shared")
        yield from speeds_on(bench, scorer, of_scoring, f"{name} beginnings", chats)
    yield from memory_of(scorer, of_scoring)


def start_scorer(model: Path, overrides: dict[str, Any]) -> tuple[Any, float]:
    """The vLLM engine as `qpipe score` starts it, but for the overrides, with dummy weights."""
    import vllm
    from qpipe.stages.engines.choose import choose_dtype, make_scorer
    from qpipe.stages.engines.settings import EngineSettings
    from qpipe.trainer.models.files import find_model

    files = find_model(f"{model}")
    dtype = choose_dtype("auto", files.config)
    started, vllm.LLM = vllm.LLM, partial(replaced, vllm.LLM, overrides)  # type: ignore[misc]
    begun = time.perf_counter()
    try:
        scorer = make_scorer(files, EngineSettings("vllm", dtype, TOP_K, max_length=MAX_LENGTH))
    finally:
        vllm.LLM = started  # type: ignore[misc]
    step = overrides.get("max_num_batched_tokens", scorer.memory.scheduled_tokens)
    scorer.memory = replace(scorer.memory, scheduled_tokens=step)  # it gives the window
    return scorer, time.perf_counter() - begun


def replaced(start: Callable[..., Any], overrides: dict[str, Any], **options: Any) -> Any:
    """Start with other options than are given."""
    return start(**(options | {"load_format": "dummy"} | overrides))


def forms(scorer: Any) -> dict[str, Any]:
    """What the engine is told that it can do, for each form of scoring; None if it cannot."""
    stock = replace(scorer.can, rows_alone=False, block_size=0)
    alone = replace(stock, rows_alone=True) if scorer.can.rows_alone else None
    both = scorer.can if alone and scorer.can.block_size else None
    return {"every row": stock, "supervised rows": alone, "supervised rows, cache read": both}


def speeds_on(
    bench: Bench, scorer: Any, of_scoring: dict[str, Any], name: str, chats: Path
) -> Iterator[Row]:
    """Each form of scoring on some conversations, in turns; the median of the seconds."""
    from qpipe.pipeline.folders.sealed import read_scores

    first = bench.work / f"out-{time.time_ns()}"
    run_stage(scorer, chats, first)  # also warms up
    examples = list(read_scores(first))
    tokens = sum(len(example.input_ids) for example in examples)
    positions = sum(len(example.positions) for example in examples)
    yield Row(f"{name}: tokens", tokens)
    yield Row(f"{name}: supervised", 100 * positions / tokens, "%")
    ways: dict[str, Callable[[], float]] = {
        "bare prefill": partial(generate, scorer.llm, examples),
        "bare prompt_logprobs": partial(generate, scorer.llm, examples, TOP_K),
    }
    for form, can in of_scoring.items():
        if can is not None:
            ways[f"qpipe, {form}"] = partial(scored_as, bench, scorer, can, chats)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(_TURNS):
        for way in ways if turn % 2 == 0 else reversed(ways):
            seconds[way].append(ways[way]())
    bare = median(seconds["bare prefill"])
    for way, found in seconds.items():
        of_bare = f"{bare / median(found):.2f} of bare prefill"
        yield Row(f"{name}: {way}", tokens / median(found), "tokens/s", of_bare)
    yield from differences(bench, scorer, of_scoring, name, chats)


def generate(llm: Any, examples: Sequence[Any], top_k: int | None = None) -> float:
    """Seconds of vLLM's own interface, with prompt log-probabilities or without."""
    from vllm import SamplingParams

    options = {} if top_k is None else {"prompt_logprobs": top_k, "flat_logprobs": True}
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True, **options
    )
    prompts = [{"prompt_token_ids": example.input_ids.tolist()} for example in examples]
    begun = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begun


def scored_as(bench: Bench, scorer: Any, can: Any, chats: Path) -> float:
    """Seconds of the stage, reading and writing included, with an engine that is told its form."""
    return run_stage(told(scorer, can), chats, bench.work / f"out-{time.time_ns()}")


def told(scorer: Any, can: Any) -> Any:
    """The scorer, told what it can do."""
    scorer.can = can
    return scorer


def run_stage(scorer: Any, chats: Path, out: Path) -> float:
    """Seconds of the stage as the command runs it, but for an engine that is there already."""
    from qpipe.stages.score import stage
    from qpipe.stages.score.from_demonstrations import score
    from qpipe.tests.support.settings import score_settings

    settings = score_settings(
        model=f"{scorer.model.folder}",
        demonstrations=(f"{chats}",),
        out=out,
        engine="vllm",
        dtype=scorer.settings.dtype,
        top_k=TOP_K,
        max_length=MAX_LENGTH,
    )
    made, stage.make_scorer = stage.make_scorer, lambda *_: scorer
    try:
        return score(settings).seconds
    finally:
        stage.make_scorer = made


def differences(
    bench: Bench, scorer: Any, of_scoring: dict[str, Any], name: str, chats: Path
) -> Iterator[Row]:
    """How far the scores of each form are from those of every row."""
    import numpy as np
    from qpipe.pipeline.folders.sealed import read_scores

    few = bench.work / "few-lines.jsonl"
    few.write_text("".join(chats.open().readlines()[:32]))
    folders = {}
    for form, can in of_scoring.items():
        if can is not None:
            folders[form] = bench.work / f"out-{time.time_ns()}"
            run_stage(told(scorer, can), few, folders[form])
    stock = {example.id: example for example in read_scores(folders.pop("every row"))}
    for form, folder in folders.items():
        pairs = [(stock[example.id], example) for example in read_scores(folder)]
        observed = [np.abs(a.observed_log_probs - b.observed_log_probs) for a, b in pairs]
        ranks = [a.observed_ranks == b.observed_ranks for a, b in pairs]
        top = [np.abs(a.topk_log_probs - b.topk_log_probs) for a, b in pairs]
        largest = max(float(np.concatenate(each).max()) for each in (observed, top))
        yield Row(f"{name}: {form}, largest difference from every row", largest, "nats")
        equal = 100 * float(np.concatenate(ranks).mean())
        yield Row(f"{name}: {form}, ranks equal to every row's", equal, "%")


def memory_of(scorer: Any, of_scoring: dict[str, Any]) -> Iterator[Row]:
    """The peak of the engine's process in each form, above bare prefill's, and the plan's."""
    import torch

    if not torch.cuda.is_available():
        return
    examples = longest_examples(scorer)
    scorer.llm.apply_model(reset_peak)
    generate(scorer.llm, examples)
    (bare,) = scorer.llm.apply_model(peak_bytes)
    gib = 2**30
    yield Row("memory: peak of bare prefill, all in the engine", bare / gib, "GiB")
    yield Row("memory: planned for log-probabilities", scorer.memory.added / gib, "GiB")
    for form, can in of_scoring.items():
        if can is None:
            continue
        scorer.llm.apply_model(reset_peak)
        list(told(scorer, can).score(examples, TOP_K))
        (peak,) = scorer.llm.apply_model(peak_bytes)
        yield Row(f"memory: {form}, above bare prefill", (peak - bare) / gib, "GiB")
    free, total = torch.cuda.mem_get_info()
    yield Row("memory: of the card in use", (total - free) / gib, "GiB")
    yield Row("memory: of the card", total / gib, "GiB")


def longest_examples(scorer: Any) -> list[Any]:
    """Examples of the greatest length, supervised everywhere."""
    import numpy as np
    from qpipe.tests.support.examples import unweighted

    rng = np.random.default_rng(1)
    positions = np.arange(1, MAX_LENGTH, dtype=np.int32)
    return [
        unweighted(f"{n}", rng.integers(0, 40000, MAX_LENGTH).astype(np.int32), positions)
        for n in range(8)
    ]


def reset_peak(_: Any) -> None:
    """In the engine's process: forget the peak of the memory."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_bytes(_: Any) -> int:
    """In the engine's process: the peak of the memory in use."""
    import torch

    return torch.cuda.max_memory_allocated()


def _speeds(size: str, **overrides: Any) -> Callable[[Bench], Iterator[Row]]:
    return partial(speeds, size=size, **overrides)


PARTS = {
    "score-0.6b": Part("scoring at the dimensions of a 0.6B model", _speeds("0.6B"), 140),
    "score-8b": Part("scoring at the dimensions of an 8B model", _speeds("8B"), 150),
    "alignment-float32": Part(
        "scores in float32 against dense log-probabilities",
        partial(alignment, names=("float32",)),
        110,
    ),
    "alignment": Part(
        "scores in bfloat16 against dense log-probabilities in float32",
        partial(alignment, names=("auto", "--at")),
        150,
    ),
    "steps-2048": Part(
        "a 0.6B model with steps of 2,048 tokens",
        _speeds("0.6B", beginnings=("own",), max_num_batched_tokens=2048),
        90,
    ),
    "steps-8192": Part(
        "a 0.6B model with steps of 8,192 tokens",
        _speeds("0.6B", beginnings=("own",), max_num_batched_tokens=8192),
        90,
    ),
    "steps-16384": Part(
        "a 0.6B model with steps of 16,384 tokens",
        _speeds("0.6B", beginnings=("own",), max_num_batched_tokens=16384),
        90,
    ),
    "compiled": Part(
        "a 0.6B model, compiled with CUDA graphs",
        _speeds("0.6B", beginnings=("own",), enforce_eager=False),
        150,
    ),
}
