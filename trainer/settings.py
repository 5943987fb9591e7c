"""What a training run is told."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..pipeline.errors import UserError
from .schedule import Schedule

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Resume = Literal["auto", "never"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of `qpipe train`.

    An optimizer step takes `batch_size` examples over all processes, or as many as have
    `step_tokens` tokens; each process cuts its share into forward passes of `forward_tokens` padded
    tokens, which leaves the gradient as it is. Raises UserError for a value out of its range.
    """

    targets: Path
    model: str
    out: Path
    revision: str | None = None
    method: str | None = None  # None: the folder's own; "sft" trains any folder on its tokens alone
    epochs: float = 1.0
    max_steps: int | None = None  # stop there, if the epochs would take longer
    learning_rate: float = 1e-5  # at its highest
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03  # share of the steps
    batch_size: int = 8
    step_tokens: int | None = None  # instead of batch_size
    forward_tokens: int = 8192
    pack: bool = False  # examples end to end without padding
    weight_decay: float = 0.0  # of matrices only
    max_grad_norm: float = 1.0
    precision: Precision = "auto"  # of the forward pass; the weights are trained in float32
    gradient_checkpointing: bool = False
    lora_rank: int | None = None  # None: all weights learn
    eval_fraction: float = 0.0  # share of the examples that is held out
    eval_every: int | None = None  # steps; before the first and after the last in any case
    save_every: int | None = 500  # steps between checkpoints
    keep_checkpoints: int = 2
    resume: Resume = "auto"  # from the latest checkpoint, if there is one
    seed: int = 0
    verify: bool = True  # the hash of every shard, when the targets are opened

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed, is_allowed = _ALLOWED.get(field.name, _ANYTHING)
            if not is_allowed(value):
                option = "--" + field.name.replace("_", "-")
                raise UserError(f"{option} {value} cannot be used: give {allowed}")
        if self.eval_every is not None and self.eval_fraction == 0:
            raise UserError("--eval-every needs held-out examples: give --eval-fraction too")


_Rule = tuple[str, Callable[[Any], bool]]  # comparisons with NaN are false, so it is never allowed
_ANYTHING: _Rule = ("anything", lambda _: True)
_MOST = 10**9
_POSITIVE: _Rule = ("above 0, up to 1,000,000", lambda value: 0 < value <= 1e6)
_ONE_OR_MORE: _Rule = ("1 to 1,000,000,000", lambda value: 1 <= value <= _MOST)
_NONE_OR_MORE: _Rule = ("1 to 1,000,000,000", lambda value: value is None or 1 <= value <= _MOST)
_ALLOWED: dict[str, _Rule] = {
    "epochs": _POSITIVE,
    "max_steps": _NONE_OR_MORE,
    "learning_rate": _POSITIVE,
    "schedule": (", ".join(get_args(Schedule)), lambda value: value in get_args(Schedule)),
    "warmup_ratio": ("0 to 1", lambda value: 0 <= value <= 1),
    "batch_size": _ONE_OR_MORE,
    "step_tokens": _NONE_OR_MORE,
    "forward_tokens": _ONE_OR_MORE,
    "save_every": _NONE_OR_MORE,
    "keep_checkpoints": _ONE_OR_MORE,
    "resume": (", ".join(get_args(Resume)), lambda value: value in get_args(Resume)),
    "weight_decay": ("0 or more", lambda value: 0 <= value < math.inf),
    "max_grad_norm": ("a number above 0", lambda value: value > 0),
    "precision": (", ".join(get_args(Precision)), lambda value: value in get_args(Precision)),
    "eval_fraction": ("0 or more, below 1", lambda value: 0 <= value < 1),
    "eval_every": _NONE_OR_MORE,
    "lora_rank": ("1 to 1,024", lambda value: value is None or 1 <= value <= 1024),
    "seed": ("0 to 4294967295", lambda value: 0 <= value < 2**32),
}
