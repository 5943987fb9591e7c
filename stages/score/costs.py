"""What scoring and training would take of GPUs: hours and bytes, reckoned before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...trainer.models.files import ModelFiles
from ...trainer.models.size import count_weights, forward_flop

H100_TFLOPS = 989.0  # a GPU's peak: an H100's in bfloat16 without sparsity, by its data sheet
UTILIZATION = 0.4  # of the peak; assumed, not measured
EPOCH = 3  # forward passes that a forward and a backward pass are worth
# float32 weights, their gradients and the two moments of AdamW
TRAINED_WEIGHT_BYTES = 16
# of a supervised token at 99 % of the probability, as measured on SmolLM2's scores of GSM8K
TARGET_BYTES = 50


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a GPU gets done: `speed` in supervised tokens a second, or else `tflops`, its peak."""

    tflops: float = H100_TFLOPS
    speed: float | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """What the model takes of all GPUs together."""

    throughput: Throughput
    flop: float  # of scoring
    score_hours: float
    epoch_hours: float  # of training the model
    training_bytes: int  # activations come besides
    targets_bytes: int


def costs(
    model: ModelFiles, lengths: Mapping[int, int], positions: int, throughput: Throughput
) -> Costs | None:
    """The costs of demonstrations of some lengths (tokens: number), with `positions` supervised.

    None where the configuration does not tell how many weights there are.
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
