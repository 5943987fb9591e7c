"""Estimates GPU hours and memory of scoring and training before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...trainer.models.files import ModelFiles
from ...trainer.models.size import count_weights, forward_flop

H100_TFLOPS = 989.0  # peak of an H100 in bfloat16 without sparsity, by its data sheet
UTILIZATION = 0.4  # of the peak; assumed, not measured
EPOCH = 3  # cost of a forward and a backward pass, in forward passes
# float32 weights, their gradients and the two moments of AdamW
TRAINED_WEIGHT_BYTES = 16
# per supervised token at top-p 0.99, measured on SmolLM2's scores of GSM8K
TARGET_BYTES = 50


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
