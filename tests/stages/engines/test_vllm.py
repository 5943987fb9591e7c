"""The vLLM scorer beside its numbers: both ways to the arrays, its start, and coming back."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines import vllm_arrays, vllm_engine, vllm_requests, vllm_start
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.vllm_memory import EngineMemory
from qpipe.stages.engines.vllm_requests import Abilities
from qpipe.stages.engines.vllm_start import is_memory
from qpipe.stages.score import stage as score_stage
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.support.examples import unweighted
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import find_model

from ...conftest import make_tiny_model
from ...support.rows import write_chats

VOCAB = 320


def example(seed: int, length: int) -> WeightedExample:
    """Every second token is supervised, and of the longer ones none of the first 20."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    return unweighted(
        f"e{seed}", ids, np.arange(1 if length < 50 else 21, length, 2, dtype=np.int32)
    )


EXAMPLES = [example(seed, length) for seed, length in enumerate((12, 200, 2, 256, 61, 33, 7, 100))]


@pytest.fixture
def scorer(vllm_scorer: Any) -> Any:
    return vllm_scorer


def run(scorer: Any, top_k: int = 8) -> list[ScoredExample]:
    by_place = dict(scorer.score(EXAMPLES, top_k))
    assert len(by_place) == len(EXAMPLES)
    return [by_place[place] for place in range(len(EXAMPLES))]


def check_same(results: list[ScoredExample], others: list[ScoredExample]) -> None:
    for one, other in zip(results, others, strict=True):
        for field in fields(ScoredExample):
            left, right = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(left, right)
            assert getattr(left, "dtype", None) == getattr(right, "dtype", None)


def test_kept_tensors_and_flat_lists_are_the_same_numbers(
    scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scorer.can.keeps_tensors
    monkeypatch.setattr(scorer, "can", replace(scorer.can, rows_alone=False))
    kinds: list[type] = []

    def seen(prompt_logprobs: Any) -> Any:
        kinds.append(type(prompt_logprobs))
        return vllm_arrays.prompt_arrays(prompt_logprobs)

    monkeypatch.setattr(vllm_requests, "prompt_arrays", seen)
    kept = run(scorer)
    monkeypatch.setattr(scorer, "can", replace(scorer.can, keeps_tensors=False))
    flat = run(scorer)
    check_same(kept, flat)
    assert kinds[0] is list
    assert kinds[-1].__name__ == "FlatLogprobs"


def test_tensors_that_come_in_parts_are_joined() -> None:
    parts = [
        (torch.full((n, 3), n), torch.full((n, 3), -1.0 * n), torch.full((n,), n)) for n in (2, 1)
    ]
    arrays = vllm_arrays.prompt_arrays(parts)
    assert arrays.ids.tolist() == [[2] * 3, [2] * 3, [1] * 3]
    assert arrays.log_probs[:, 0].tolist() == [-2, -2, -1]
    assert arrays.ranks.tolist() == [2, 2, 1]


def test_another_build_of_vllm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    assert vllm_arrays.keeps_tensors()
    monkeypatch.setattr(
        LogprobsProcessor, "_update_prompt_logprobs", lambda self, tensors, other: None
    )
    assert not vllm_arrays.keeps_tensors()
    monkeypatch.delattr(LogprobsProcessor, "_update_prompt_logprobs")
    assert not vllm_arrays.keeps_tensors()


@pytest.mark.parametrize("window", [1, 200])
def test_what_is_in_flight_changes_no_byte(
    scorer: Any, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = run(scorer)
    monkeypatch.setattr(vllm_engine, "window_tokens", lambda step: window)
    check_same(run(scorer), everything)


class Failing:
    """The engine, one of whose steps raises an error."""

    def __init__(self, engine: Any, at_step: int, error: Exception) -> None:
        self.engine, self.left, self.error = engine, at_step, error
        self.output_processor = engine.output_processor
        self.add_request = engine.add_request

    def step(self) -> list[Any]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.engine.step()


class Answering:
    """The engine, whose answers are changed on their way."""

    def __init__(self, engine: Any, change: Any) -> None:
        self.engine, self.change = engine, change
        self.output_processor = engine.output_processor
        self.add_request = engine.add_request

    def step(self) -> list[Any]:
        outputs = self.engine.step()
        for output in outputs:
            output.prompt_logprobs = [
                [self.change(tensor) for tensor in part[:3]] for part in output.prompt_logprobs
            ]
        return outputs


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[1:], r"\d+ (of \d+ rows|of .* tokens)|log-probabilities of \d+ tok"),
        (lambda tensor: tensor[:, :1] if tensor.ndim == 2 else tensor, "1 values at a token for"),
    ],
)
def test_an_answer_of_another_shape_is_refused(
    scorer: Any, alone: bool, change: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a row, or with the observed token alone."""
    engine = scorer.engine
    monkeypatch.setattr(scorer, "can", Abilities(keeps_tensors=True, rows_alone=alone))
    monkeypatch.setattr(scorer, "engine", Answering(engine, change))
    with pytest.raises(UserError, match=words):
        dict(scorer.score(EXAMPLES[:1], 8))
    assert not engine.output_processor.external_req_ids


def out_of_memory() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def engine_dead() -> Exception:
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError()


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_smaller_and_nothing_is_lost(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With steps of 128 tokens, chunked prefill included, the bytes are those of one large step."""
    settings = EngineSettings("vllm", "float32", max_length=256)
    scorer: Any = make_scorer(find_model(str(tiny_model)), settings)
    before = run(scorer)
    scorer.memory = replace(scorer.memory, scheduled_tokens=256)
    monkeypatch.setattr(vllm_engine, "window_tokens", lambda step: 100)
    scorer.engine = Failing(scorer.engine, 3, out_of_memory())
    capsys.readouterr()
    check_same(run(scorer), before)
    assert scorer.memory.scheduled_tokens == 128
    assert scorer.engine.vllm_config.scheduler_config.max_num_batched_tokens == 128
    said = capsys.readouterr().err
    assert said.count("starting it again with 128 tokens a step; no finished work is lost") == 1

    scorer.engine = Failing(scorer.engine, 1, engine_dead())
    check_same(run(scorer), before)
    assert scorer.memory.scheduled_tokens == 64
    scorer.engine = Failing(scorer.engine, 2, out_of_memory())
    with pytest.raises(UserError, match=r"again, at 64 tokens a step: .*finished shards are kept"):
        run(scorer)


def test_an_error_that_is_not_of_memory_ends_the_run(scorer: Any) -> None:
    engine = scorer.engine
    scorer.engine = Failing(engine, 1, ValueError("a\nmistake"))
    try:
        with pytest.raises(UserError, match="vLLM stopped: a mistake: finished shards are kept"):
            run(scorer)
    finally:
        engine.abort_request(list(engine.output_processor.external_req_ids))
        scorer.engine = engine


def test_what_was_finished_before_an_engine_stopped_is_kept(
    scorer: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And going on after it makes the folder of an undisturbed run."""
    chats = write_chats(tmp_path / "chats.jsonl", 30)
    monkeypatch.setattr(score_stage, "make_scorer", lambda *_: scorer)
    engine = scorer.engine

    def make(out: Path) -> dict[str, bytes]:
        score(
            score_settings(
                model=str(tiny_model), demonstrations=(str(chats),), out=out, engine="vllm",
                top_k=4, shard_size=10, max_length=200,
            )
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in out.iterdir()}

    undisturbed = make(tmp_path / "whole")
    assert len([name for name in undisturbed if name.startswith("shard-")]) == 8
    scorer.engine = Failing(engine, 4, ValueError("a mistake"))
    with pytest.raises(UserError, match="vLLM stopped: a mistake: finished shards are kept"):
        make(tmp_path / "torn")
    kept = list((tmp_path / "torn").glob("shard-*.arrow"))
    assert 0 < len(kept) < 4
    written = {path: path.stat().st_mtime_ns for path in kept}
    engine.abort_request(list(engine.output_processor.external_req_ids))
    scorer.engine = engine
    assert make(tmp_path / "torn") == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == written


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_told_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")  # GiB
    settings = EngineSettings("vllm", "float32", max_length=256)
    with pytest.raises(UserError, match="vLLM cannot start with model tiny: ") as caught:
        make_scorer(find_model(str(tiny_model)), settings)
    assert "\n" not in str(caught.value)


_LIMITED = """
import resource, sys, psutil
from dataclasses import replace
import numpy as np
from qpipe.tests.support.examples import unweighted
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.choose import make_scorer
from qpipe.trainer.models.files import find_model
ids = np.arange(255, dtype=np.int32)
one = unweighted("a", ids, np.arange(1, 255, dtype=np.int32))
scorer = make_scorer(find_model(sys.argv[1]), EngineSettings("vllm", "float32", max_length=255))
(_, free), = scorer.score([one], 8)
# it runs with more, and comes back with 64
scorer.memory = replace(scorer.memory, scheduled_tokens=128)
limit = psutil.Process().memory_info().vms + 190 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
(_, limited), = scorer.score([one], 8)
assert scorer.memory.scheduled_tokens == 64, scorer.memory
np.testing.assert_array_equal(limited.topk_log_probs, free.topk_log_probs)
np.testing.assert_array_equal(limited.observed_ranks, free.observed_ranks)
"""


@pytest.mark.slow
def test_a_process_without_memory_for_large_steps_goes_on_with_small_ones(tmp_path: Path) -> None:
    """255 rows take 260 MB at this vocabulary, 64 take 65 MB; 190 MB are left."""
    model = make_tiny_model(tmp_path / "model", vocab_size=60_000)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(model)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "can't allocate memory" in done.stderr


@pytest.mark.parametrize("has_gpu", [False, True])
def test_settings_of_the_environment_are_vllms_own(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    """And with a GPU the engine's process is not forked: CUDA would fail in it."""
    from vllm import envs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    with torch._dynamo.config.patch(disable=False):  # which it sets on a CPU
        vllm_start._prepare_environment(EngineSettings("vllm", "float32", max_length=256), 256)
    of_triton = environment.pop("TRITON_F32_DEFAULT", None)
    assert of_triton == ("ieee" if has_gpu else None)  # float32 attention is not in TF32
    assert set(environment) <= set(envs.environment_variables)
    assert (environment.get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn") is has_gpu
    assert (environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0") is not has_gpu


def test_an_engine_in_a_process_of_its_own_that_cannot_start_may_lack_memory() -> None:
    assert is_memory(
        RuntimeError(
            "Engine core initialization failed. See root cause above. Failed core proc(s): "
            "{'EngineCore_DP0': 1}"
        )
    )
    assert not is_memory(ValueError("Unknown architecture"))


@pytest.mark.parametrize(
    ("death", "starts", "words"),
    [
        ("Engine core initialization failed.", 2, "vLLM cannot start with model .*--engine tr"),
        ("CUDA out of memory", 4, "tokens a step: CUDA out of memory: "),
    ],
)
def test_an_engine_that_does_not_say_why_it_did_not_start_is_tried_once_more(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, death: str, starts: int, words: str
) -> None:
    tried: list[int] = []

    def start(model: Any, settings: Any, memory: EngineMemory) -> Any:
        tried.append(memory.scheduled_tokens)
        raise vllm_start.EngineStoppedError(death)

    monkeypatch.setattr(vllm_engine, "start_engine", start)
    with pytest.raises(UserError, match=words):
        make_scorer(find_model(str(tiny_model)), EngineSettings("vllm", "float32", max_length=256))
    assert len(tried) == starts
    assert tried[1] == tried[0] // 2


@pytest.mark.slow
def test_a_float32_head_gives_bfloat16_models_scores_without_ties(tiny_model: Path) -> None:
    """And a head in bfloat16 does not, so that the option does something."""
    tied = {}
    for head in ("float32", "model"):
        settings = EngineSettings("vllm", "bfloat16", head_dtype=head, max_length=256)
        scorer: Any = make_scorer(find_model(str(tiny_model)), settings)
        assert scorer.can.rows_alone
        results = run(scorer, top_k=64)
        tops = [one.topk_log_probs.reshape(-1, 64) for one in results]
        tied[head] = np.mean([np.mean(np.diff(top_Nk, axis=1) == 0) for top_Nk in tops])
        vllm_start.stop_engine(scorer.llm)
    assert tied["float32"] < 0.001
    assert tied["model"] > 0.05
