"""The learning rate over the steps of a run."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The share of the full learning rate at a step, counted from 0.

    It climbs in even parts through the warm-up and reaches 1 at step `warmup_steps`; from there
    "cosine" and "linear" fall to 0, which they would reach at step `steps`.
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
