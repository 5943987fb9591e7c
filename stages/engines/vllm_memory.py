"""What prompt log-probabilities add to vLLM's memory, and the largest step that fits beside them.

vLLM sizes its KV cache by a trial run without prompt log-probabilities, so that these come on top
of `gpu_memory_utilization`. For one request after another a step turns the rows of its tokens into
logits [rows, V] of the model's number format, log-probabilities [rows, V] in float32, their top k
and the rank of the observed token (`GPUModelRunner._get_prompt_logprobs_dict`, vLLM 0.32). Its
newer model runner takes 1024 rows at a time and needs less.
"""

from dataclasses import dataclass

MOST_SCHEDULED, LEAST_SCHEDULED = 2048, 64  # tokens of a step
_GPU_RESERVE = 2**30  # CUDA's own, fragments of the allocator, whoever else is on the GPU
_CPU_RESERVE = 2**30
_ACTIVATIONS = 2**30  # what the trial run finds besides the weights


@dataclass(frozen=True, slots=True)
class Rows:
    """What a row of prompt log-probabilities is made of."""

    vocab_size: int
    top_k: int
    value_bytes: int  # of the model's number format
    tensor_parallel_size: int = 1
    on_cpu: bool = False

    @property
    def bytes(self) -> int:
        """The most that a row takes at any time.

        With V values of the logits' format: their parts on each GPU, as gathered and in order; then
        the logits, their float32 copy and the log-probabilities; then these with the comparison
        that counts the rank and, where it is not compiled (on a CPU), its sum in 64-bit integers.
        """
        own = self.value_bytes
        parts = self.tensor_parallel_size
        gathering = own * (2 + 1 / parts) if parts > 1 else own
        normalising = own + 4 + (4 if own < 4 else 0)
        ranking = own + 4 + (1 + 8 if self.on_cpu else 0)
        # of each of the top k: value and index, both once more beside the observed, index narrowed
        of_top = self.top_k * (4 + 8 + 4 + 8 + 4)
        return int(self.vocab_size * max(gathering, normalising, ranking)) + of_top


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """How an engine is configured so that prompt log-probabilities fit; all sizes in bytes."""

    scheduled_tokens: int  # of a step
    utilization: float  # share of the GPU that vLLM plans with
    added: int  # by prompt log-probabilities, outside of that share
    needed: int  # by the weights and one KV cache window, inside of it


def fit_gpu(
    total: int, most_utilization: float, weights: int, kv_cache: int, rows: Rows, longest: int
) -> EngineMemory:
    """The largest step that fits a GPU of `total` bytes beside the weights on it.

    The engine's share of the GPU gives way before the step does, as scoring needs a KV cache of
    `kv_cache` bytes only. Where nothing fits, the smallest step: the engine will say what lacks.
    """
    needed = weights + kv_cache + _ACTIVATIONS
    plans = []
    for tokens in _steps():
        added = min(tokens, longest) * rows.bytes
        share = max(0.01, 1 - (added + _GPU_RESERVE) / total)
        plan = EngineMemory(tokens, round(min(most_utilization, share), 4), added, needed)
        if plan.utilization * total >= needed:
            return plan
        plans.append(plan)
    return plans[-1]


def fit_cpu(available: int, weights: int, kv_cache: int, rows: Rows, longest: int) -> EngineMemory:
    """The largest step that fits into `available` bytes beside the weights and the KV cache."""
    spare = available - weights - kv_cache - _CPU_RESERVE
    fitting = (each for each in _steps() if min(each, longest) * rows.bytes <= spare)
    tokens = next(fitting, LEAST_SCHEDULED)
    return EngineMemory(tokens, 1.0, min(tokens, longest) * rows.bytes, weights + kv_cache)


def _steps() -> list[int]:
    """Step sizes to choose from, the largest first."""
    steps = [MOST_SCHEDULED]
    while steps[-1] > LEAST_SCHEDULED:
        steps.append(steps[-1] // 2)
    return steps
