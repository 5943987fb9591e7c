"""How fast `qpipe score` is beside what it is built on.

    python tests/benchmarks/score.py MODEL [DEMONSTRATIONS]

MODEL is a folder; DEMONSTRATIONS are chats of several turns, 40 % of whose tokens are supervised,
made of data/arithmetic.jsonl where none are given. k is 64, and numbers are float32, on a CPU
(`make gpu` measures a GPU). Seven figures, each of runs that take turns, medians of them:

- the stage with vLLM, reading, tokenising and writing included, against a bare `LLM.generate` with
  `flat_logprobs=True, detokenize=False`, on an engine of its own with vLLM's defaults, which
  compiles the model, and on qpipe's engine, whose layers use other kernels;
- the same two where besides 60 % of each chat is a beginning that all share;
- the stage with transformers against a plain script: padded batches of 8 in the order given,
  log-softmax and top k over all positions;
- what the front end costs a token, on arrays, without a model;
- the stage around a stand-in for a GPU that takes 40 µs a token and leaves the cores free, against
  that engine alone: whether shards are read and written while the engine works.

The stage's seconds are those that it reports, as its speed is: shards from reading to writing,
without the start of the engine and the hash of its weights.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from qpipe.pipeline.folders.sealed import read_scores
from qpipe.pipeline.format.records import WeightedExample
from qpipe.stages.engines.base import scored
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.vllm_arrays import keep_tensors, prompt_arrays
from qpipe.stages.quiet import quiet_libraries
from qpipe.stages.score import stage as score_stage
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.benchmarks.figures import Figure, faster, publish, timed
from qpipe.tests.gpu.chats import make_chats
from qpipe.tests.support.examples import unweighted
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import ModelFiles, find_model, load_model

TOP_K, MAX_LENGTH = 64, 1024
CHATS = int(os.environ.get("CHATS", "48"))
RUNS = int(os.environ.get("RUNS", "3"))
PLAIN_BATCH = 8
DTYPE = "float32"
SECONDS_A_TOKEN = 40e-6  # as of a model of some billions of parameters on a large GPU


def main(model: Path, demonstrations: Path | None) -> None:
    """Measure and print."""
    quiet_libraries()
    files = find_model(str(model))
    fast: Any = make_scorer(files, EngineSettings("vllm", DTYPE, TOP_K, max_length=MAX_LENGTH))
    engines = {"bare LLM.generate": bare_engine(files), "the same, qpipe's engine": fast.llm}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chats = demonstrations or make_chats(work / "chats.jsonl", CHATS, shared=False)
        shared = make_chats(work / "shared.jsonl", CHATS, shared=True)
        with_vllm = partial(measure_vllm, scorer=fast, engines=engines, files=files)
        measures = (
            partial(with_vllm, "score with vLLM", chats=chats, folder=work / "own"),
            partial(
                with_vllm,
                "score with vLLM, shared beginnings",
                chats=shared,
                folder=work / "shared",
            ),
            partial(measure_transformers, files, chats, work / "transformers"),
        )
        publish([figure for measure in measures for figure in measure()])
    print(f"front end: {front_end(TOP_K):.2f} µs a token at k = {TOP_K}")
    around_an_engine(files)


def measure_vllm(
    what: str, scorer: Any, engines: dict[str, Any], files: ModelFiles, chats: Path, folder: Path
) -> list[Figure]:
    """The stage against bare prompt log-probabilities on some engines."""
    run_stage("vllm", scorer, files, chats, folder / "warm")
    examples = list(read_scores(folder / "warm"))
    tokens = said(what, examples)
    outs = (folder / f"out-{run}" for run in count())
    ours, *others = in_turns(
        lambda: run_stage("vllm", scorer, files, chats, next(outs)),
        *(partial(timed, partial(generate, llm, examples)) for llm in engines.values()),
    )
    pairs = zip(engines, others, strict=True)
    return [faster(what, ours, beside, theirs, tokens, "tokens") for beside, theirs in pairs]


def measure_transformers(files: ModelFiles, chats: Path, folder: Path) -> list[Figure]:
    """The stage against a plain script."""
    scorer: Any = make_scorer(files, EngineSettings("transformers", DTYPE, max_length=MAX_LENGTH))
    model = load_model(files, getattr(torch, DTYPE)).eval()
    run_stage("transformers", scorer, files, chats, folder / "warm")
    examples = list(read_scores(folder / "warm"))
    what = "score with transformers"
    tokens = said(what, examples)
    outs = (folder / f"out-{run}" for run in count())
    ours, theirs = in_turns(
        lambda: run_stage("transformers", scorer, files, chats, next(outs)),
        lambda: timed(lambda: plain_script(model, examples)),
    )
    return [faster(what, ours, "padded batches, top k everywhere", theirs, tokens, "tokens")]


def in_turns(*ways: Callable[[], float]) -> list[list[float]]:
    """The seconds that each way gives in each run, after one that warms up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for run in range(RUNS + 1):
        order = list(zip(seconds, ways, strict=True))
        for kept, way in order if run % 2 else reversed(order):
            kept.append(way())
        print(*(f"{kept[-1]:.2f}" for kept in seconds), "seconds", flush=True)
    return [kept[1:] for kept in seconds]


def said(what: str, examples: list[Any]) -> int:
    """Print the work of a figure; returns its tokens."""
    tokens = sum(len(example.input_ids) for example in examples)
    positions = sum(len(example.positions) for example in examples)
    print(
        f"{what}: {tokens:,} tokens, {positions / tokens:.0%} of them supervised, k = {TOP_K}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()}",
        flush=True,
    )
    return tokens


def run_stage(
    engine: str, scorer: Any, files: ModelFiles, chats: Path, out: Path, shard_size: int = 512
) -> float:
    """Seconds of the stage as the command runs it, but for an engine that is there already."""
    settings = score_settings(
        model=str(files.folder),
        demonstrations=(str(chats),),
        out=out,
        engine=engine,
        top_k=TOP_K,
        max_length=MAX_LENGTH,
        shard_size=shard_size,
    )
    made, score_stage.make_scorer = score_stage.make_scorer, lambda *_: scorer
    try:
        return score(settings).seconds
    finally:
        score_stage.make_scorer = made


def bare_engine(files: ModelFiles) -> Any:
    """vLLM as one starts it for this."""
    from vllm import LLM

    return LLM(str(files.folder), dtype=DTYPE, max_model_len=MAX_LENGTH + 1, max_logprobs=TOP_K)


def generate(llm: Any, examples: list[Any]) -> None:
    """Prompt log-probabilities by vLLM's own interface."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=TOP_K, flat_logprobs=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": example.input_ids.tolist()} for example in examples]
    llm.generate(prompts, sampling, use_tqdm=False)


@torch.inference_mode()
def plain_script(model: Any, examples: list[Any]) -> None:
    """What one writes first: batches in order, everything at every position."""
    for start in range(0, len(examples), PLAIN_BATCH):
        some = examples[start : start + PLAIN_BATCH]
        batch = [torch.from_numpy(example.input_ids).long() for example in some]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        lengths = torch.tensor([len(each) for each in batch], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
        log_probs = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        top = log_probs.topk(TOP_K, dim=-1)
        log_probs[:, :-1].gather(2, ids[:, 1:, None])
        top.values.cpu().numpy(), top.indices.cpu().numpy()


class _Request:
    """As much of vLLM's engine as `keep_tensors` touches, for one request."""

    def __init__(self, top_k: int) -> None:
        from vllm.v1.engine.logprobs import LogprobsProcessor

        self.processor = LogprobsProcessor(None, None, None, None, None, top_k)
        self.output_processor = self
        self.request_states = {"r": self}
        self.logprobs_processor = self.processor


def front_end(top_k: int) -> float:
    """Microseconds a token from the engine's tensors to a scored example."""
    from vllm.v1.outputs import LogprobsTensors

    T, requests = 512, 200
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49152, T).astype(np.int32)
    example = unweighted("e", ids, np.arange(1, T, dtype=np.int32))
    log_probs = -np.sort(rng.exponential(3, (T - 1, top_k + 1)), axis=1).astype(np.float32) - 2
    tensors = LogprobsTensors(
        torch.from_numpy(rng.integers(0, 49152, (T - 1, top_k + 1)).astype(np.int32)),
        torch.from_numpy(log_probs),
        torch.ones(T - 1, dtype=torch.int64),
    )

    def one() -> None:
        example.input_ids.tolist()
        engine = _Request(top_k)
        keep_tensors(engine, "r")
        engine.processor._update_prompt_logprobs(tensors)
        arrays = prompt_arrays(engine.processor.prompt_logprobs)
        rows = example.positions - 1
        scored(
            example,
            arrays.log_probs[rows, 0],
            arrays.ranks[rows],
            arrays.ids[rows, 1:],
            arrays.log_probs[rows, 1:],
            49152,
        )

    one()
    seconds = median(timed(lambda: [one() for _ in range(requests)]) for _ in range(5))
    return seconds / requests / T * 1e6


class _Elsewhere:
    """An engine on a processor of its own; what it answers is made up."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        weights = np.sort(rng.exponential(1, (MAX_LENGTH, TOP_K)) ** 4, axis=1)[:, ::-1]
        masses = weights / weights.sum(axis=1, keepdims=True) * 0.98
        self.log_probs = np.log(masses).astype(np.float32)
        self.ids = rng.integers(0, 49152, (MAX_LENGTH, TOP_K)).astype(np.int32)
        self.tokens, self.seconds = 0, 0.0

    def score(self, examples: list[WeightedExample], top_k: int, at: None = None) -> Any:
        for place, example in enumerate(examples):
            tokens = len(example.input_ids)
            self.tokens += tokens
            self.seconds += timed(partial(time.sleep, tokens * SECONDS_A_TOKEN))
            rows = slice(len(example.positions))
            log_probs, ids = self.log_probs[rows], self.ids[rows]
            ones = np.ones(len(ids), np.int32)
            yield place, scored(example, log_probs[:, 0], ones, ids, log_probs, 49152)


def around_an_engine(files: ModelFiles) -> None:
    """What reading, tokenising, packing and writing cost an engine that needs no core."""
    engine = _Elsewhere()
    with tempfile.TemporaryDirectory() as folder:
        chats = make_chats(Path(folder) / "chats.jsonl", 1024, shared=False)
        seconds = run_stage("transformers", engine, files, chats, Path(folder) / "out", 64)
    print(
        f"around an engine of {engine.tokens / engine.seconds:,.0f} tokens/s elsewhere: "
        f"{engine.tokens / seconds:,.0f} tokens/s, {engine.seconds / seconds:.3f} of it"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
