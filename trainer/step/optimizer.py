"""The optimizer and its learning-rate schedule."""

import math
from importlib.util import find_spec
from typing import Any

import torch

from ...pipeline.errors import UserError
from ..settings import OptimizerName, Schedule


def make_optimizer(
    name: OptimizerName, model: torch.nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a model's trained weights; weight decay on matrices alone.

    Raises UserError if its library is not installed.
    """
    groups = parameter_groups(model, weight_decay)
    match name:
        case "adamw":
            # one kernel: on a CPU four times as fast as torch's default, a loop over the weights
            return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        case "adamw-8bit":
            return _bitsandbytes(name).AdamW8bit(groups, lr=learning_rate)
        case "adamw-paged-8bit":
            return _bitsandbytes(name).PagedAdamW8bit(groups, lr=learning_rate)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained weights in two groups: the matrices, which decay, and all others.

    Others are biases, the scales of norms, and embeddings, also when tied to the head: the row of a
    token that does not occur gets no gradient, and decay alone would shrink it.
    """
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter.ndim >= 2 and parameter not in embeddings for parameter in trained]
    matrices = [parameter for parameter, does in zip(trained, decays, strict=True) if does]
    others = [parameter for parameter, does in zip(trained, decays, strict=True) if not does]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _bitsandbytes(name: OptimizerName) -> Any:
    """The optimizers of bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"--optimizer {name} needs bitsandbytes: pip install 'qpipe[8bit]'")
    from bitsandbytes import optim  # pyright: ignore[reportMissingImports]

    return optim


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The learning rate at a step, counted from 0, as a share of the full one.

    It rises linearly during the warm-up and reaches 1 at step `warmup_steps`; from there "cosine"
    and "linear" fall towards 0, reached at step `steps`, one after the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0
