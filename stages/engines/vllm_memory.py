"""Computes the memory of prompt log-probabilities in vLLM, and the largest step that fits.

vLLM sizes its KV cache by a trial run without prompt log-probabilities, so that these come on top
of `gpu_memory_utilization`. For one request after another a step turns the rows of its tokens into
logits [rows, V] of the model's number format, log-probabilities [rows, V] in float32, their top k
and the rank of the observed token (`GPUModelRunner._get_prompt_logprobs_dict`, vLLM 0.32). Its
newer model runner takes 1024 rows at a time and needs less.
"""

from dataclasses import dataclass

MOST_SCHEDULED, LEAST_SCHEDULED = 2048, 64  # tokens of a step
_GPU_RESERVE = 2**30  # CUDA itself, fragmentation, other processes on the GPU
_CPU_RESERVE = 2**30
_ACTIVATIONS = 2**30  # found by the trial run in addition to the weights


@dataclass(frozen=True, slots=True)
class RowCost:
    """The memory of one row of prompt log-probabilities."""

    vocab_size: int
    top_k: int
    value_bytes: int  # of the model's number format
    tensor_parallel_size: int = 1
    on_cpu: bool = False

    @property
    def bytes(self) -> int:
        """The peak memory of a row.

        With V values in the logits' format: their parts on each GPU, as gathered and in order; then
        the logits, their float32 copy and the log-probabilities; then these with the comparison
        that counts the rank and, if it is not compiled (on a CPU), its sum in 64-bit integers.
        """
        own = self.value_bytes
        parts = self.tensor_parallel_size
        gathering = own * (2 + 1 / parts) if parts > 1 else own
        normalising = own + 4 + (4 if own < 4 else 0)
        ranking = own + 4 + (1 + 8 if self.on_cpu else 0)
        # per entry of the top k: value and index, both copied next to the observed, narrowed index
        of_top = self.top_k * (4 + 8 + 4 + 8 + 4)
        return int(self.vocab_size * max(gathering, normalising, ranking)) + of_top


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """An engine configuration in which prompt log-probabilities fit; all sizes in bytes."""

    scheduled_tokens: int  # of a step
    utilization: float  # `gpu_memory_utilization` of vLLM
    added: int  # by prompt log-probabilities, outside of that share
    needed: int  # by the weights and one KV cache window, inside of it


def fit_gpu(
    total: int, most_utilization: float, weights: int, kv_cache: int, row: RowCost, longest: int
) -> EngineMemory:
    """The largest step that fits a GPU of `total` bytes beside the weights on it.

    The engine's share of the GPU is reduced before the step is, as scoring needs a KV cache of
    `kv_cache` bytes only. If nothing fits, it is the smallest step, and the engine reports why.
    """
    needed = weights + kv_cache + _ACTIVATIONS
    plans = []
    for tokens in _steps():
        added = min(tokens, longest) * row.bytes
        share = max(0.01, 1 - (added + _GPU_RESERVE) / total)
        plan = EngineMemory(tokens, round(min(most_utilization, share), 4), added, needed)
        if plan.utilization * total >= needed:
            return plan
        plans.append(plan)
    return plans[-1]


def fit_cpu(
    available: int, weights: int, kv_cache: int, row: RowCost, longest: int
) -> EngineMemory:
    """The largest step that fits into `available` bytes beside the weights and the KV cache."""
    spare = available - weights - kv_cache - _CPU_RESERVE
    fitting = (each for each in _steps() if min(each, longest) * row.bytes <= spare)
    tokens = next(fitting, LEAST_SCHEDULED)
    return EngineMemory(tokens, 1.0, min(tokens, longest) * row.bytes, weights + kv_cache)


def _steps() -> list[int]:
    """Step sizes in tokens, the largest first."""
    steps = [MOST_SCHEDULED]
    while steps[-1] > LEAST_SCHEDULED:
        steps.append(steps[-1] // 2)
    return steps
