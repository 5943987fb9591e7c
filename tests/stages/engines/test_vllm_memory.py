"""What vLLM is given of a GPU's memory, and of a CPU's."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.engines import vllm_memory
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.vllm_memory import (
    EngineMemory,
    activation_bytes,
    fit_cpu,
    fit_gpu,
    kv_cache_on_each,
    plan_memory,
    row_bytes,
    runner_of,
    smaller,
)
from qpipe.tests.support.tiers import slow
from qpipe.trainer.models.files import ModelFiles, find_model
from qpipe.trainer.models.size import count_weights, kv_cache_bytes, weight_bytes
from transformers import MambaConfig, Mistral3Config, Qwen3Config, T5Config

GIB = 2**30


def large(vocab_size: int = 152_000, **options: Any) -> ModelFiles:
    """A model of a 32B's dimensions whose files are elsewhere."""
    config = Qwen3Config(
        **cast(Any, {
            "vocab_size": vocab_size, "hidden_size": 5120, "intermediate_size": 25600,
            "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 128,
        } | options)
    )  # fmt: skip
    return ModelFiles("large", None, Path("/nowhere"), config, cast(Any, None))


def asked(dtype: Any = "bfloat16", **options: Any) -> EngineSettings:
    return EngineSettings("vllm", dtype, top_k=64, max_length=4096, **options)


def test_rows_of_each_runner() -> None:
    """Bytes a value of the vocabulary, and 28 for each of the top k."""
    rows = {
        (runner, dtype): (row_bytes(large(1000), asked(dtype), runner) - 64 * 28) / 1000
        for runner in ("V1", "V2", "CPU")
        for dtype in ("bfloat16", "float32")
    }
    assert rows == {
        ("V2", "bfloat16"): 4,  # logits, and a copy where the vocabulary is padded
        ("V2", "float32"): 8,
        ("V1", "bfloat16"): 11,  # logits, log-probabilities, rows copied and compared
        ("V1", "float32"): 13,
        ("CPU", "bfloat16"): 2,  # logits
        ("CPU", "float32"): 4,
    }


def test_a_float32_head_has_logits_of_float32() -> None:
    wide, narrow = (
        row_bytes(large(1000), asked(head_dtype=head), "V2") for head in ("float32", "model")
    )
    assert wide - narrow == 4000


def test_a_divided_vocabulary_is_not_gathered() -> None:
    whole, half = (
        row_bytes(large(1000), asked(tensor_parallel_size=parts), "V1") - 64 * 28
        for parts in (1, 2)
    )
    assert half == whole / 2


def test_a_soft_cap_takes_two_temporaries() -> None:
    capped = large(1000, final_logit_softcapping=30.0)
    assert row_bytes(capped, asked(), "V2") - row_bytes(large(1000), asked(), "V2") == 4000


_SAMPLER = """
import sys, torch
from qpipe.stages.engines.supervised_rows.gather import gathered_log_probs
torch.set_num_threads(1)
rows, size, dtype = int(sys.argv[2]), 40_000, getattr(torch, sys.argv[1])
def status(name):
    return int(open("/proc/self/status").read().split(name)[1].split()[0]) * 1024
def work(rows):
    hidden = torch.randn(rows, 8, dtype=dtype)
    logits = hidden @ torch.randn(8, size, dtype=dtype)
    none = torch.empty((rows, 0), dtype=torch.int64)
    return gathered_log_probs(logits, torch.zeros(rows).long(), none, 64)
work(2)
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
work(rows)
print(status("VmHWM:") - before)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float32")])
def test_rows_take_on_a_cpu_what_is_planned(dtype: str) -> None:
    """In a process whose peak is looked at; a copy of all rows in float32 would take 312 MiB."""
    rows, of_blocks = 2048, 120 * 2**20  # what blocks take, and what the allocator keeps of them
    done = subprocess.run(
        [sys.executable, "-c", _SAMPLER, dtype, f"{rows}"],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = rows * row_bytes(large(40_000), asked(dtype), "CPU")
    assert 0.9 * planned < int(done.stdout) < planned + of_blocks


ROW = 1_520_000  # bytes; 1,024 of them take 1.45 GiB


def fit(
    total: float, weights: float, most: float = 0.92, free: float | None = None, longest: int = 4097
) -> EngineMemory:
    """Sizes in GiB; a step takes 1 GiB for 8,192 tokens, and the KV cache 1 GiB for 16,384."""

    def needed(step: int, kv_tokens: int) -> int:
        return int(GIB * (weights + step / 8192 + kv_tokens / 16384))

    free = total if free is None else free
    return fit_gpu("V2", int(total * GIB), int(free * GIB), most, needed, ROW, longest)


def test_a_large_gpu_takes_the_largest_step() -> None:
    plan = fit(80, 16)
    assert (plan.scheduled_tokens, plan.utilization, plan.binds) == (8192, 0.92, "step")
    assert plan.added == 1024 * ROW
    assert plan.needed == 18.5 * GIB  # three steps in the KV cache
    assert plan.fits


def test_the_share_gives_way_to_the_rows() -> None:
    plan = fit(24, 8)
    assert plan.scheduled_tokens == 8192
    assert plan.utilization == pytest.approx((24 - 1 - 1024 * ROW / GIB) / 24, abs=1e-3)


def test_what_other_processes_use_is_left_to_them() -> None:
    plan = fit(80, 16, free=50)
    assert plan.utilization * 80 * GIB + plan.added + GIB <= 50 * GIB
    assert plan.scheduled_tokens == 8192
    assert fit(80, 60, free=50).binds == "memory"


def test_a_full_gpu_takes_a_smaller_step() -> None:
    # 21.55 GiB are left: a step of 4,096 takes 0.5, a window of 16,384 1
    plan = fit(24, 20, most=1)
    assert (plan.scheduled_tokens, plan.binds) == (4096, "memory")
    assert plan.utilization * 24 * GIB >= plan.needed
    # no room for a window: a step of 2,048 takes 0.125, the longest example 0.25
    plan = fit(24, 21, most=1)
    assert (plan.scheduled_tokens, plan.binds) == (2048, "memory")
    assert plan.fits
    assert plan.utilization * 24 * GIB < plan.needed


def test_a_share_that_is_too_small_is_named_and_costs_no_tokens() -> None:
    """At 64 tokens a step the weights are as large."""
    plan = fit(80, 66, most=0.8)
    assert (plan.scheduled_tokens, plan.utilization, plan.binds) == (8192, 0.8, "share")
    assert not plan.fits
    assert plan.least_utilization == pytest.approx((66 + 1 + 0.5) / 80)
    nowhere = fit(24, 60)
    assert (nowhere.scheduled_tokens, nowhere.binds, nowhere.fits) == (2048, "memory", False)
    assert fit(80, 62.6, most=0.8).binds == "share"  # fits with a smaller step
    assert fit(80, 62.6, most=0.8).fits


@pytest.mark.parametrize(
    ("model", "gpus", "needed", "peak"),
    [
        (large(151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
               tie_word_embeddings=True, num_attention_heads=16), 1, 4.9, 74.8),
        (large(151_936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
               num_attention_heads=32), 1, 20.5,
         74.8),
        (large(151_936), 1, 69.6, 74.8),
        (large(128_256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80), 2, 71.7,
         74.4),
        (large(262_208, hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
               tie_word_embeddings=True, num_attention_heads=32, num_key_value_heads=16), 1, 64.7,
         75.6),
    ],
)  # fmt: skip
def test_the_table_of_the_docs(model: ModelFiles, gpus: int, needed: float, peak: float) -> None:
    """Models of Qwen3's, Llama's and Gemma's dimensions on a GPU of 80 GiB."""
    settings = asked(tensor_parallel_size=gpus, head_dtype="float32")
    plan = plan_memory(model, settings, 80 * GIB)
    assert (plan.scheduled_tokens, plan.utilization, plan.binds) == (8192, 0.92, "step")
    assert plan.needed / GIB == pytest.approx(needed, abs=0.1)
    assert (plan.utilization * 80 * GIB + plan.added) / GIB == pytest.approx(peak, abs=0.1)


def test_long_examples_need_their_whole_kv_cache() -> None:
    assert fit(80, 16, longest=100_001).needed == int(GIB * (17 + 100_001 / 16384))


def test_after_a_death_of_memory_step_and_share_are_smaller() -> None:
    plan = fit(80, 66)
    after = smaller(plan)
    assert after.scheduled_tokens == 4096
    assert after.utilization == pytest.approx(plan.least_utilization, abs=1e-4)  # not below it
    assert smaller(fit(80, 16)).utilization == pytest.approx(0.828)
    on_cpu = fit_cpu(20 * GIB, 2 * GIB, 2 * GIB, ROW)
    assert smaller(on_cpu).utilization == on_cpu.utilization


def test_a_cpu_takes_what_is_free() -> None:
    rows = 17 * 152_000  # 2.58 MB each
    assert fit_cpu(20 * GIB, 2 * GIB, 2 * GIB, rows).scheduled_tokens == 2048
    assert fit_cpu(7 * GIB, 2 * GIB, 2 * GIB, rows).scheduled_tokens == 512
    assert fit_cpu(1 * GIB, 2 * GIB, 2 * GIB, rows).scheduled_tokens == 64
    assert fit_cpu(1 * GIB, 2 * GIB, 2 * GIB, rows).binds == "memory"


@pytest.mark.parametrize(
    ("installed", "options", "runner"),
    [
        ("0.25.1", {}, "V2"),
        ("0.25.1", {"layer_types": ["full_attention", "sliding_attention"] * 32}, "V2"),
        ("0.25.1", {"layer_types": ["linear_attention", "full_attention"] * 32}, "V1"),
        ("0.28.0", {"num_experts_per_tok": 8}, "V1"),
        ("0.29.0", {"num_experts_per_tok": 8}, "V2"),
        (None, {"num_experts_per_tok": 8}, "V2"),
        ("0.25.1", {"num_attention_heads": 0}, "V1"),
    ],
)
def test_the_runner_is_vllms_choice(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, options: Any, runner: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(vllm_memory, "version", version)
    config = SimpleNamespace(**({"num_attention_heads": 16} | options))
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert runner_of(model) == runner


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
    assert (plan.scheduled_tokens, plan.utilization, plan.runner) == (8192, 0.9, "V2")
    assert plan.added == 1024 * (320 * 4 + 64 * 28)


def test_gpus_that_share_the_layers_or_their_parts_share_weights_and_cache() -> None:
    files = large()
    stored = weight_bytes(files, "bfloat16") or 0
    cached = kv_cache_bytes(files, "bfloat16") * 3 * 8192
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        settings = asked(tensor_parallel_size=tp, pipeline_parallel_size=pp)
        needed = plan_memory(files, settings, gpu_memory=80 * GIB).needed
        assert needed - activation_bytes(files, settings, 8192) == (stored + cached) // (tp * pp)


def test_activations_are_those_of_the_widest_layer() -> None:
    """Two bytes a value: gate, up and their product, of 25,600; six of the hidden size of 5,120."""
    model = large()
    base = 256 * 152_000 * 12 + GIB // 2
    assert activation_bytes(model, asked(), 1000) == 1000 * 2 * (3 * 25600 + 6 * 5120) + base
    half = activation_bytes(model, asked(tensor_parallel_size=2), 1000)
    assert half == 1000 * 2 * (3 * 12800 + 6 * 5120) + base
    experts = large(num_experts_per_tok=8, moe_intermediate_size=768)
    routed = 8 * (3 * 768 + 5120) + 6 * 5120
    assert activation_bytes(experts, asked(), 1000) == 1000 * 2 * routed + base


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


def test_the_keys_and_values_on_each_gpu() -> None:
    """Of 64 layers with 8 heads of 128, in two bytes; a GPU keeps one head at least."""
    sizes = [kv_cache_on_each(large(), asked(tensor_parallel_size=n)) for n in (1, 2, 8, 16)]
    assert sizes == [64 * 2 * heads * 128 * 2 for heads in (8, 4, 1, 1)]
    of_layer = 2 * 8 * 128 * 2
    assert kv_cache_on_each(large(), asked(pipeline_parallel_size=4)) == 16 * of_layer
    assert kv_cache_on_each(large(), asked(pipeline_parallel_size=5)) == 13 * of_layer  # the most
    latent = large(kv_lora_rank=512, qk_rope_head_dim=64)  # as DeepSeek's
    for n in (1, 8):
        assert kv_cache_on_each(latent, asked(tensor_parallel_size=n)) == 64 * (512 + 64) * 2


def made(config: Any) -> ModelFiles:
    """A model whose weights are elsewhere."""
    return ModelFiles("made", None, Path("/nowhere"), config, cast(Any, None))


def test_a_model_without_attention_keeps_no_keys() -> None:
    files = made(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320))
    assert kv_cache_bytes(files, "float32") == 0
    assert plan_memory(files, asked(), 24 * GIB).fits


def test_layers_of_several_widths_count_as_the_widest() -> None:
    files = made(SimpleNamespace(get_text_config=lambda: config))
    config = SimpleNamespace(hidden_size=64, intermediate_size=[128, 256], vocab_size=320)
    base = 256 * 320 * 12 + GIB // 2
    assert activation_bytes(files, asked(), 1000) == 1000 * 2 * (3 * 256 + 6 * 64) + base


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4.25),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.25),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "fp8"}, 8.25),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8.25),
        ({"quant_method": "new"}, 16),  # not known: not less than is there
    ],
)
def test_quantised_weights_that_are_elsewhere(quantization: Any, bits: float) -> None:
    """The embedding and the head stay in bfloat16."""
    options = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    files = large(320, **options, tie_word_embeddings=False, quantization_config=quantization)
    counts = count_weights(files)
    assert counts is not None
    assert counts.embeddings == 2 * 320 * 64
    expected = counts.embeddings * 2 + (counts.stored - counts.embeddings) * bits / 8
    assert weight_bytes(files, "bfloat16") == int(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 6}, "6 does not divide the 64 attention heads of model large"),
        ({"pipeline_parallel_size": 65}, "65 is above the 64 layers of model large: give 64 or"),
    ],
)
def test_parallel_sizes_that_vllm_refuses(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_memory(large(), asked(**options), 80 * GIB)


def test_a_number_of_weights_that_is_not_known_is_not_taken_for_none() -> None:
    with pytest.raises(UserError, match="model made: its configuration does not tell the number"):
        plan_memory(made(T5Config(vocab_size=320)), asked(), 80 * GIB)


def test_weights_of_models_that_also_read_images_are_counted() -> None:
    text = {"model_type": "mistral", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1,
            "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 32}  # fmt: skip
    seen = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1,
            "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}  # fmt: skip
    counts = count_weights(made(Mistral3Config(text_config=text, vision_config=seen)))
    assert counts is not None
    assert counts.stored > 2 * 320 * 64 + 4 * 64 * 64 + 3 * 64 * 128
