"""Computes the memory of prompt log-probabilities in vLLM, and the largest step that fits.

vLLM sizes its KV cache by a trial run without prompt log-probabilities, so that these come on top
of `gpu_memory_utilization`. For one request after another a step turns the rows of its tokens into
logits [rows, V] of the model's number format, log-probabilities [rows, V] in float32, their top k
and the rank of the observed token (`GPUModelRunner._get_prompt_logprobs_dict`, vLLM 0.32). Its
newer model runner takes 1024 rows at a time and needs less.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ...trainer.models.files import ModelFiles
from ...trainer.models.size import VALUE_BYTES, kv_cache_bytes, weight_bytes
from .settings import EngineSettings

STEPS = (2048, 1024, 512, 256, 128, 64)  # tokens of a step, the first that fits is taken
WINDOW_TOKENS = 16384  # in the engine at a time, which bounds memory
CPU_KV_CACHE = 2  # GiB
_GPU_RESERVE = 2**30  # CUDA itself, fragmentation, other processes on the GPU
_CPU_RESERVE = 2**30
_ACTIVATIONS = 2**30  # found by the trial run in addition to the weights


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """An engine configuration in which prompt log-probabilities fit; all sizes in bytes."""

    scheduled_tokens: int  # of a step
    utilization: float  # `gpu_memory_utilization` of vLLM
    added: int  # by prompt log-probabilities, outside of that share
    needed: int  # by the weights and one KV cache window, inside of it


def plan_memory(
    model: ModelFiles, settings: EngineSettings, gpu_memory: int | None = None
) -> EngineMemory:
    """Choose the engine's configuration.

    `gpu_memory` is the memory of a GPU in bytes; None means that of this machine, which may have
    no GPU.
    """
    import torch

    on_cpu = gpu_memory is None and not torch.cuda.is_available()
    value_bytes, parts = VALUE_BYTES[settings.dtype], settings.tensor_parallel_size
    row = row_bytes(model.vocab_size, settings.top_k, value_bytes, parts, on_cpu)
    weights = weight_bytes(model, settings.dtype) // settings.gpus
    if on_cpu:
        kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or CPU_KV_CACHE) * 2**30
        return fit_cpu(_available_memory(), weights, kv_cache, row, settings.max_length)
    kv_cache = kv_cache_bytes(model, settings.dtype) * WINDOW_TOKENS // settings.gpus
    total = gpu_memory or _gpu_memory()
    share = settings.gpu_memory_utilization
    return fit_gpu(total, share, weights, kv_cache, row, settings.max_length)


def row_bytes(
    vocab_size: int,
    top_k: int,
    value_bytes: int,
    tensor_parallel_size: int = 1,
    on_cpu: bool = False,
) -> int:
    """The peak memory of one row of prompt log-probabilities; `value_bytes` are of the logits.

    With V values in the logits' format: their parts on each GPU, as gathered and in order; then the
    logits, their float32 copy and the log-probabilities; then these with the comparison that counts
    the rank and, if it is not compiled (on a CPU), its sum in 64-bit integers.
    """
    parts = tensor_parallel_size
    gathering = value_bytes * (2 + 1 / parts) if parts > 1 else value_bytes
    normalising = value_bytes + 4 + (4 if value_bytes < 4 else 0)
    ranking = value_bytes + 4 + (1 + 8 if on_cpu else 0)
    # per entry of the top k: value and index, both copied next to the observed, narrowed index
    of_top = top_k * (4 + 8 + 4 + 8 + 4)
    return int(vocab_size * max(gathering, normalising, ranking)) + of_top


def fit_gpu(
    total: int, most_utilization: float, weights: int, kv_cache: int, row: int, longest: int
) -> EngineMemory:
    """The largest step that fits a GPU of `total` bytes beside the weights on it.

    The engine's share of the GPU is reduced before the step is, as scoring needs a KV cache of
    `kv_cache` bytes only. If nothing fits, it is the smallest step, and the engine reports why.
    """
    needed = weights + kv_cache + _ACTIVATIONS
    plans = []
    for tokens in STEPS:
        added = min(tokens, longest) * row
        share = max(0.01, 1 - (added + _GPU_RESERVE) / total)
        plans.append(EngineMemory(tokens, round(min(most_utilization, share), 4), added, needed))
    fitting = (plan for plan in plans if plan.utilization * total >= needed)
    return next(fitting, plans[-1])


def fit_cpu(available: int, weights: int, kv_cache: int, row: int, longest: int) -> EngineMemory:
    """The largest step that fits into `available` bytes beside the weights and the KV cache."""
    spare = available - weights - kv_cache - _CPU_RESERVE
    fitting = (tokens for tokens in STEPS if min(tokens, longest) * row <= spare)
    tokens = next(fitting, STEPS[-1])
    return EngineMemory(tokens, 1.0, min(tokens, longest) * row, weights + kv_cache)


def _gpu_memory() -> int:
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory()


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
