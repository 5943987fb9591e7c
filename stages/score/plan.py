"""`qpipe score --plan`: estimates time, memory and disk from demonstrations and model files.

Rows are read and encoded as in scoring, one shard at a time. Weights are neither fetched nor
loaded, and nothing is written.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from ...pipeline.format.packing import SCORE_PRECISION
from ...pipeline.format.records import Reject
from ...pipeline.progress import progress_bar
from ...trainer.models.files import ModelFiles, find_model
from ...trainer.models.size import count_weights, forward_flop
from ..demonstrations.columns import parse_columns
from ..demonstrations.formats import check_readable
from ..demonstrations.sources import open_sources
from ..engines.choose import choose_dtype, choose_head, say_float32, this_host
from ..engines.settings import EngineSettings, Host, ServerSettings
from ..engines.vllm_memory import (
    STEPS,
    EngineMemory,
    kv_cache_on_each,
    plan_memory,
    weights_on_each,
    window_tokens,
)
from .from_demonstrations import Demonstrations
from .settings import ScoreSettings
from .stage import check_top_k

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
# Bytes in a shard, measured at k = 8, 64 and 128 on SmolLM2's scores of arithmetic. An entry is an
# id and a log-probability, which hardly compresses.
_ENTRY_BYTES, _WIDE_ENTRY_BYTES = 5.2, 5.6  # with ids of two bytes, of four
_POSITION_BYTES, _TOKEN_BYTES = 9, 2
# packed scores, measured on GSM8K at k = 64: an entry takes 3 bytes less
_PACKED_POSITION_BYTES, _PLAIN_LOG_PROB_BYTES = 4, 3.0

H100_TFLOPS = 989.0  # peak of an H100 in bfloat16 without sparsity, by its data sheet
UTILIZATION = 0.4  # of the peak; assumed, not measured
EPOCH = 3  # cost of a forward and a backward pass, in forward passes
# float32 weights, their gradients and the two moments of AdamW
TRAINED_WEIGHT_BYTES = 16
# per supervised token at top-p 0.99, measured on SmolLM2's scores of GSM8K
TARGET_BYTES = 50


@dataclass(slots=True)
class Workload:
    """Counts over the demonstrations."""

    read: int = 0
    cut: int = 0
    empty_answers: int = 0
    tokens: int = 0
    positions: int = 0  # supervised
    lengths: Counter[int] = field(default_factory=Counter)  # demonstrations by number of tokens
    rejected: int = 0
    first_reject: Reject | None = None

    @property
    def examples(self) -> int:
        """The number of examples that would be scored."""
        return self.read - self.rejected

    @property
    def quantiles(self) -> dict[float, int]:
        """Quantiles of the length in tokens; {} without demonstrations."""
        lengths = sorted(self.lengths)
        ends = np.cumsum([self.lengths[length] for length in lengths])
        if not lengths:
            return {}
        places = {share: int(np.searchsorted(ends, share * ends[-1])) for share in QUANTILES}
        return {share: lengths[place] for share, place in places.items()}


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory on each GPU; all sizes in bytes."""

    weights: int | None  # None if their number is not known
    kv_cache: int  # of the tokens in the engine at a time
    gpu: int | None = None  # memory of a GPU
    engine: EngineMemory | None = None  # how vLLM would be configured for it

    @property
    def peak(self) -> int | None:
        """The most memory in use: vLLM fills its share; prompt log-probabilities come on top."""
        if self.gpu is None or self.engine is None:
            return None
        return int(self.engine.utilization * self.gpu) + self.engine.added

    @property
    def fits(self) -> bool:
        """Whether weights, activations and the longest example fit into vLLM's share."""
        return self.engine is None or self.engine.fits


@dataclass(frozen=True, slots=True)
class Throughput:
    """Throughput of a GPU: `speed` in supervised tokens per second or else peak `tflops`."""

    tflops: float = H100_TFLOPS
    speed: float | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs over all GPUs together."""

    throughput: Throughput
    flop: float  # of scoring
    score_hours: float
    epoch_hours: float  # of training the model
    training_bytes: int  # without activations
    targets_bytes: int


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """The estimates for `qpipe score` with given options."""

    workload: Workload
    folder_bytes: int
    model: str
    dtype: str
    memory: Memory
    costs: Costs | None  # None if the model's architecture is unknown


def plan(
    settings: ScoreSettings,
    gpu_memory: float | None = None,
    throughput: Throughput | None = None,
) -> ScorePlan:
    """Look at the demonstrations and the model; `gpu_memory` is that of a GPU, in GiB."""
    sources = open_sources(settings.rows.demonstrations)
    check_readable(sources, settings.rows.format, parse_columns(settings.rows.columns))
    model = find_model(settings.model, settings.revision, weights=False)
    check_top_k(settings.engine.top_k, model)
    demonstrations = Demonstrations(replace(settings.rows, strict=False), sources, model)
    workload = _workload(demonstrations)
    host = this_host() if gpu_memory is None else Host(True, True, has_float32_head=True)
    dtype = choose_dtype(settings.engine.dtype, model.config, host)
    say_float32(dtype, host.has_gpu)
    engine = replace(
        settings.engine,
        engine="vllm",
        dtype=dtype,
        head_dtype=choose_head(settings.engine.head_dtype, "vllm", dtype, model.config, host),
        max_length=demonstrations.max_length,
        server=ServerSettings(),
    )
    return ScorePlan(
        workload=workload,
        folder_bytes=folder_bytes(
            workload, settings.engine.top_k, model.vocab_size, settings.precision == SCORE_PRECISION
        ),
        model=model.name,
        dtype=dtype,
        memory=_memory(model, engine, gpu_memory),
        costs=costs(model, workload.lengths, workload.positions, throughput or Throughput()),
    )


def folder_bytes(workload: Workload, top_k: int, vocab_size: int, is_packed: bool = False) -> int:
    """The approximate size of the score folder."""
    entry = _ENTRY_BYTES if vocab_size <= 2**16 else _WIDE_ENTRY_BYTES
    of_position = _POSITION_BYTES + top_k * entry
    if is_packed:
        of_position = _PACKED_POSITION_BYTES + top_k * (entry - _PLAIN_LOG_PROB_BYTES)
    return int(workload.positions * of_position + workload.tokens * _TOKEN_BYTES)


def costs(
    model: ModelFiles, lengths: Mapping[int, int], positions: int, throughput: Throughput
) -> Costs | None:
    """The costs of demonstrations with these lengths (tokens: number) and supervised positions.

    None if the number of weights cannot be computed from the configuration.
    """
    weights = count_weights(model)
    if weights is None:
        return None
    flop = forward_flop(model, weights.multiplied, lengths)
    if throughput.speed is None:
        seconds = flop / (UTILIZATION * throughput.tflops * 1e12)
    else:
        seconds = positions / throughput.speed
    return Costs(
        throughput=throughput,
        flop=flop,
        score_hours=seconds / 3600,
        epoch_hours=EPOCH * seconds / 3600,
        training_bytes=weights.stored * TRAINED_WEIGHT_BYTES,
        targets_bytes=positions * TARGET_BYTES,
    )


def _workload(demonstrations: Demonstrations) -> Workload:
    work = Workload()
    with progress_bar(total=demonstrations.count, desc="plan", unit="demo") as progress:
        for index in count():
            shard = demonstrations.read(index)
            if shard is None:
                break
            rejects = shard.content.rejects
            work.rejected += len(rejects)
            work.first_reject = work.first_reject or next(iter(rejects), None)
            work.read += len(shard.examples) + len(rejects)
            work.cut += int(shard.content.sums.get("cut", 0))
            work.empty_answers += int(shard.content.sums.get("empty_answers", 0))
            for example in shard.examples:
                work.tokens += len(example.input_ids)
                work.positions += len(example.positions)
                work.lengths[len(example.input_ids)] += 1
            progress.update(len(shard.examples) + len(rejects))
    return work


def _memory(model: ModelFiles, settings: EngineSettings, gpu_memory: float | None) -> Memory:
    weights = weights_on_each(model, settings)
    of_token = kv_cache_on_each(model, settings)
    if gpu_memory is None:
        return Memory(weights, of_token * window_tokens(STEPS[0]))
    gpu = int(gpu_memory * 2**30)
    engine = plan_memory(model, settings, gpu)
    return Memory(weights, of_token * window_tokens(engine.scheduled_tokens), gpu, engine)
