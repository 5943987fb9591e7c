"""Computes the memory of prompt log-probabilities in vLLM, and the largest step that fits.

vLLM sizes its KV cache by a trial run without prompt log-probabilities, so that these come on top
of `gpu_memory_utilization`. `supervised_rows` computes at most `CHUNK_ROWS` rows of logits at a
time, whatever the step, so that a larger step costs activations and KV cache only. The rows of
vLLM's first model runner (V1) take a float32 copy, those of its second (V2) do not.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import floor
from pathlib import Path
from typing import Any, Literal

from ...pipeline.errors import UserError
from ...trainer.models.files import ModelFiles
from ...trainer.models.size import VALUE_BYTES, attention_heads, kv_cache_bytes, weight_bytes
from .settings import EngineSettings
from .supervised_rows.steps import CHUNK_ROWS
from .vllm_groups import layers_of_groups, most_weights

STEPS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)  # tokens of a step, the first that fits
USUAL_STEP = 2048  # enough for full speed on a CPU, and nearly on a GPU
WINDOW_TOKENS = 16384  # in the engine at a time, which bounds memory; at least three steps
WINDOW_STEPS = 3
CPU_KV_CACHE = 2  # GiB
MOST_UTILIZATION = 0.92  # vLLM's own default
MAX_SEQUENCES = 256  # in a step; vLLM's trial run samples as many tokens
_RESERVE = 2**30  # fragmentation, other processes
_RUNTIME = 2**29  # CUDA and communication, inside vLLM's share

Runner = Literal["V1", "V2", "CPU"]
Binding = Literal["step", "share", "memory"]


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """An engine configuration in which prompt log-probabilities fit; all sizes in bytes."""

    runner: Runner
    scheduled_tokens: int  # of a step
    utilization: float  # `gpu_memory_utilization` of vLLM
    added: int  # by prompt log-probabilities, outside of that share
    needed: int  # by weights, activations and the KV cache of a window, inside of it
    least_utilization: float = 0.0  # with a KV cache for a step and the longest example only
    # what keeps the step from being larger: the largest of `STEPS`, the most that vLLM may reserve,
    # or the memory
    binds: Binding = "step"

    @property
    def fits(self) -> bool:
        return self.least_utilization <= self.utilization


def plan_memory(
    model: ModelFiles, settings: EngineSettings, gpu_memory: int | None = None
) -> EngineMemory:
    """Choose the engine's configuration.

    `gpu_memory` is the memory of a GPU in bytes; None means that of this machine, which may have
    no GPU.
    """
    import torch

    runner = "CPU" if gpu_memory is None and not torch.cuda.is_available() else runner_of(model)
    row = row_bytes(model, settings, runner)
    weights = weights_on_each(model, settings)
    if weights is None:
        raise UserError(
            f"model {model.name}: its configuration does not tell the number of its weights: "
            "give a folder that has them"
        )
    if runner == "CPU":
        kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or CPU_KV_CACHE) * 2**30
        return fit_cpu(_available_memory(), weights, kv_cache, row)
    total, free = (gpu_memory, gpu_memory) if gpu_memory else _gpu_memory()
    of_token = kv_cache_on_each(model, settings)

    def needed(step: int, kv_tokens: int) -> int:
        return weights + activation_bytes(model, settings, step) + of_token * kv_tokens

    most = settings.gpu_memory_utilization or MOST_UTILIZATION
    return fit_gpu(runner, total, free, most, needed, row, settings.max_length + 1)


def weights_on_each(model: ModelFiles, settings: EngineSettings) -> int | None:
    """Bytes of the weights on the GPU that has the most; None if their number is not known.

    The GPUs of a group share every matrix, the groups of a pipeline divide the layers. Raises
    UserError for a parallel size that vLLM refuses.
    """
    config = model.config.get_text_config()
    heads, layers = attention_heads(config), config.num_hidden_layers
    parts = settings.tensor_parallel_size
    if heads % parts:
        able = ", ".join(f"{n}" for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"--tensor-parallel-size {parts} does not divide the {heads} attention heads of model "
            f"{model.name}: give one of {able}"
        )
    if settings.pipeline_parallel_size > layers:
        raise UserError(
            f"--pipeline-parallel-size {settings.pipeline_parallel_size} is above the {layers} "
            f"layers of model {model.name}: give {layers} or less"
        )
    total = weight_bytes(model, settings.dtype)
    return None if total is None else most_weights(model, settings, total) // parts


def kv_cache_on_each(model: ModelFiles, settings: EngineSettings) -> int:
    """Bytes of the keys and values of a token on the GPU that has the most layers."""
    layers = model.config.get_text_config().num_hidden_layers
    of_model = kv_cache_bytes(model, settings.dtype, settings.tensor_parallel_size)
    return of_model // layers * max(layers_of_groups(layers, settings.pipeline_parallel_size))


def runner_of(model: ModelFiles) -> Runner:
    """The model runner that vLLM uses on a GPU, by its own rule: for every model from 0.29 on, and
    before for dense models with attention in every layer."""
    try:
        minor = int(version("vllm").split(".")[1])
    except (PackageNotFoundError, ValueError, IndexError):
        return "V2"
    config = model.config.get_text_config()
    has_others = any("attention" not in kind or "linear" in kind for kind in _layer_kinds(config))
    has_others |= not attention_heads(config)
    return "V2" if minor >= 29 or not (has_others or _experts_met(config)) else "V1"


def _layer_kinds(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ())


def _experts_met(config: Any) -> int:
    """The number of experts that a token uses; 0 without a mixture."""
    return getattr(config, "num_experts_per_tok", None) or 0


def row_bytes(model: ModelFiles, settings: EngineSettings, runner: Runner) -> int:
    """The peak memory of one row of log-probabilities.

    A value of the vocabulary takes its logit; in V2 a copy of that where the vocabulary is padded,
    and two temporaries under a soft cap; in V1, and where the vocabulary is divided among GPUs, a
    float32 copy, and what compares it. On a CPU only the rows of a block have copies
    (`supervised_rows.blocks`).
    """
    logit, parts = VALUE_BYTES[settings.logits_dtype], settings.tensor_parallel_size
    config = model.config.get_text_config()
    capped = 2 * logit if getattr(config, "final_logit_softcapping", None) else 0
    if runner == "CPU":
        value = logit + capped
    elif runner == "V1" or parts > 1:
        value = logit + max(4 + 5, capped)
    else:
        value = 2 * logit + capped
    # per entry of the top k: value and index, both copied next to the observed, narrowed index
    return model.vocab_size * value // parts + settings.top_k * (4 + 8 + 4 + 8 + 4)


def activation_bytes(model: ModelFiles, settings: EngineSettings, step: int) -> int:
    """What vLLM's trial run finds besides the weights: the widest layer of a step of tokens, three
    float32 rows of the vocabulary for each sampled token, and the runtime."""
    config = model.config.get_text_config()
    hidden, met = config.hidden_size, _experts_met(config)
    inner = getattr(config, "moe_intermediate_size", None) if met else None
    inner = inner or getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list) else inner  # one for each layer
    layer = 3 * inner // settings.tensor_parallel_size + (hidden if met else 0)
    of_token = VALUE_BYTES[settings.dtype] * ((met or 1) * layer + 6 * hidden)
    sampled = min(MAX_SEQUENCES, step) * model.vocab_size * 3 * 4
    return step * of_token + sampled + _RUNTIME


def fit_gpu(
    runner: Runner,
    total: int,
    free: int,
    most: float,
    needed: Callable[[int, int], int],
    row: int,
    longest: int,
) -> EngineMemory:
    """The largest step that fits a GPU of `total` bytes, `free` of which no other process uses.

    `most` bounds vLLM's share. `needed` gives the bytes inside it for a step and a number of tokens
    in the KV cache: those of a window or, where that costs a usual step, those of a step and of the
    longest example. If nothing fits, the plan is the largest step that would with a larger share,
    or else a usual one, since a smaller step leaves the weights as they are.
    """

    def plan(step: int, binds: Binding) -> EngineMemory:
        added = min(CHUNK_ROWS, step) * row
        share = floor(1e4 * max(0.01, min(most, room(step)))) / 1e4
        return EngineMemory(runner, step, share, added, window(step), least(step) / total, binds)

    def room(step: int) -> float:
        return (free - min(CHUNK_ROWS, step) * row - _RESERVE) / total

    def window(step: int) -> int:
        return needed(step, max(window_tokens(step), longest))

    def least(step: int) -> int:
        return needed(step, max(step, longest))

    usual = [step for step in STEPS if step >= USUAL_STEP]
    for steps, wanted in ((usual, window), (STEPS, least)):
        binds: Binding = "step"
        for step in steps:
            if wanted(step) / total <= min(most, room(step)):
                return plan(step, binds)
            binds = "share" if wanted(step) / total <= room(step) else "memory"
    step = next((step for step in STEPS if least(step) / total <= room(step)), None)
    return plan(USUAL_STEP, "memory") if step is None else plan(step, "share")


def fit_cpu(available: int, weights: int, kv_cache: int, row: int) -> EngineMemory:
    """The largest step that fits into `available` bytes beside the weights and the KV cache."""
    spare = available - weights - kv_cache - _RESERVE
    steps = [step for step in STEPS if step <= USUAL_STEP]
    fitting = (step for step in steps if min(CHUNK_ROWS, step) * row <= spare)
    step = next(fitting, steps[-1])
    added = min(CHUNK_ROWS, step) * row
    binds: Binding = "step" if step == USUAL_STEP else "memory"
    return EngineMemory("CPU", step, 1.0, added, weights + kv_cache, binds=binds)


def smaller(memory: EngineMemory) -> EngineMemory:
    """After a death of memory: half the step and, on a GPU, a tenth less of vLLM's share, since the
    rows of logits are the same for all steps of `CHUNK_ROWS` tokens or more."""
    share = memory.utilization
    if memory.runner != "CPU":
        share = round(min(share, max(0.9 * share, memory.least_utilization)), 4)
    return replace(memory, scheduled_tokens=memory.scheduled_tokens // 2, utilization=share)


def window_tokens(step: int) -> int:
    """Tokens in the engine at a time."""
    return max(WINDOW_TOKENS, WINDOW_STEPS * step)


def _gpu_memory() -> tuple[int, int]:
    """The memory of the first GPU, and what of it is free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total, free


def _available_memory() -> int:
    """Bytes of memory that this process may still allocate."""
    import resource

    import psutil

    limits = [psutil.virtual_memory().available]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        limits.append(most - psutil.Process().memory_info().vms)
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        limits.append(most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or no limit
        pass
    return max(0, min(limits))
