"""What vLLM is given of a GPU's memory, and of a CPU's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.vllm_memory import fit_cpu, fit_gpu, plan_memory, row_bytes
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.size import kv_cache_bytes, weight_bytes

VOCAB = 320  # of the tiny model
GIB = 2**30


def test_rows_on_one_gpu() -> None:
    # logits in bfloat16, their float32 copy, the result: 10 bytes a value; 28 of each of the top k
    assert row_bytes(1000, 0, value_bytes=2) == 10_000
    assert row_bytes(1000, 10, value_bytes=2) == 10_280
    assert row_bytes(1000, 0, value_bytes=4) == 8_000


def test_rows_of_a_shared_vocabulary_are_gathered() -> None:
    # a half, the whole as gathered, the whole in order: 2.5 values, more than what comes after
    assert row_bytes(1000, 0, value_bytes=4, tensor_parallel_size=2) == 10_000
    assert row_bytes(1000, 0, value_bytes=2, tensor_parallel_size=2) == 10_000


_SAMPLER = """
import sys, torch
from vllm.v1.sample.sampler import Sampler
torch._dynamo.config.disable = True
torch.set_num_threads(1)
rows, size, dtype = 512, 40_000, getattr(torch, sys.argv[1])
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
def work(rows):
    hidden = torch.randn(rows, 8, dtype=dtype)
    logits = hidden @ torch.randn(8, size, dtype=dtype)
    return Sampler.gather_logprobs(Sampler.compute_logprobs(logits), 64, torch.zeros(rows).long())
work(2)
before = resident()
open("/proc/self/clear_refs", "w").write("5")
work(rows)
print((peak() - before) / (rows * size))
"""


@pytest.mark.parametrize(("dtype", "value_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_rows_take_on_a_cpu_what_is_planned(dtype: str, value_bytes: int) -> None:
    """vLLM's own functions, in a process whose peak is looked at."""
    done = subprocess.run(
        [sys.executable, "-c", _SAMPLER, dtype], capture_output=True, text=True, check=True
    )
    planned = row_bytes(40_000, 64, value_bytes, on_cpu=True) / 40_000
    assert float(done.stdout) == pytest.approx(planned, rel=0.1)


ROWS = row_bytes(vocab_size=152_000, top_k=0, value_bytes=2)  # 1.52 MB each


def test_a_large_gpu_takes_the_whole_step() -> None:
    plan = fit_gpu(80 * GIB, 0.8, 16 * GIB, 2 * GIB, ROWS, longest=4096)
    assert (plan.scheduled_tokens, plan.utilization) == (2048, 0.8)
    assert plan.added == 2048 * 1_520_000


def test_the_share_gives_way_before_the_step_does() -> None:
    # 2048 rows take 2.9 GiB, a GiB is kept back: 20.1 of 24 GiB are left, for 10 that are needed
    plan = fit_gpu(24 * GIB, 0.95, 8 * GIB, 1 * GIB, ROWS, longest=4096)
    assert plan.scheduled_tokens == 2048
    assert plan.utilization == pytest.approx((24 - 1 - plan.added / GIB) / 24, abs=1e-3)


def test_a_full_gpu_takes_a_smaller_step() -> None:
    # 20.5 of 24 GiB are needed: 2.5 are left beside the reserve, and 1024 rows take 1.45
    plan = fit_gpu(24 * GIB, 0.95, 18 * GIB + GIB // 2, 1 * GIB, ROWS, longest=4096)
    assert plan.scheduled_tokens == 1024
    assert plan.utilization * 24 * GIB >= plan.needed
    assert 24 * GIB * (1 - plan.utilization) >= plan.added + GIB


def test_short_examples_need_no_room_for_a_whole_step() -> None:
    plan = fit_gpu(24 * GIB, 0.95, 18 * GIB + GIB // 2, 1 * GIB, ROWS, longest=500)
    assert plan.scheduled_tokens == 2048
    assert plan.added == 500 * ROWS


def test_a_cpu_takes_what_is_free() -> None:
    rows = row_bytes(152_000, 0, 4, on_cpu=True)  # 17 bytes a value: 2.58 MB each
    assert fit_cpu(20 * GIB, 2 * GIB, 2 * GIB, rows, 4096).scheduled_tokens == 2048
    assert fit_cpu(8 * GIB, 2 * GIB, 2 * GIB, rows, 4096).scheduled_tokens == 1024
    assert fit_cpu(1 * GIB, 2 * GIB, 2 * GIB, rows, 4096).scheduled_tokens == 64


def test_sizes_of_a_model_are_those_of_its_weights(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    files = find_model(str(tiny_model))
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    values = sum(each.numel() for each in loaded.parameters())
    assert weight_bytes(files, "float32") == 4 * values
    assert weight_bytes(files, "bfloat16") == 2 * values
    # 2 layers, a key and a value of one head of 32
    assert kv_cache_bytes(files, "float32") == 2 * 2 * 32 * 4


def test_a_damaged_file_of_weights_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"model tiny: model\.safetensors cannot be read: .*again"):
        weight_bytes(find_model(str(folder)), "float32")


def test_memory_planned_for_a_gpu_that_is_not_here(tiny_model: Path) -> None:
    settings = EngineSettings("vllm", "bfloat16", max_length=256, gpu_memory_utilization=0.9)
    plan = plan_memory(find_model(str(tiny_model)), settings, gpu_memory=24 * GIB)
    assert (plan.scheduled_tokens, plan.utilization) == (2048, 0.9)
    assert plan.added == 256 * (VOCAB * 10 + 64 * 28)


def test_gpus_that_share_the_layers_or_their_parts_share_weights_and_cache(
    tiny_model: Path,
) -> None:
    files = find_model(str(tiny_model))
    of_model = weight_bytes(files, "bfloat16") + kv_cache_bytes(files, "bfloat16") * 16384
    needed = [
        plan_memory(
            files,
            EngineSettings(
                "vllm", "bfloat16", 256, tensor_parallel_size=tp, pipeline_parallel_size=pp
            ),
            gpu_memory=24 * GIB,
        ).needed
        for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2))
    ]
    assert [each - GIB for each in needed] == [of_model // parts for parts in (1, 2, 2, 4)]


def test_weights_that_a_folder_holds_twice_count_once(tiny_model: Path, tmp_path: Path) -> None:
    """Mistral's folders have them in a file of another form too, which nobody here loads."""
    folder = tmp_path / "twice"
    shutil.copytree(tiny_model, folder)
    once = weight_bytes(find_model(str(folder)), "float32")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_bytes(find_model(str(folder)), "float32") == once
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(find_model(str(folder)), "float32") == once
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"model twice: model.safetensors.index.json is damaged: fetch"
    ):
        weight_bytes(find_model(str(folder)), "float32")
