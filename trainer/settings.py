"""The settings of `qpipe train`."""

import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from ..pipeline.errors import UserError, option_of
from ..pipeline.storage.remote import is_remote
from .data.shares import shares_of

OptimizerName = Literal["adamw", "adamw-8bit", "adamw-paged-8bit"]

Schedule = Literal["cosine", "linear", "constant"]

TrackerName = Literal["tensorboard", "wandb"]


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker whose library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"--track {name} needs {name}: pip install 'qpipe[{name}]'")


CHECKPOINT = "{checkpoint}"


def parse_command(command: str) -> list[str]:
    """The words of a command. Raises UserError where it cannot be run."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--eval-command {command}: cannot be read: {error}") from error
    if not any(CHECKPOINT in word for word in words):
        raise UserError(
            f"--eval-command {command}: does not say where the model goes: put {CHECKPOINT} there, "
            f"as in 'python my_eval.py {CHECKPOINT}'"
        )
    if shutil.which(words[0]) is None:
        raise UserError(f"--eval-command {command}: no such program: {words[0]}")
    return words


Precision = Literal["auto", "float32", "bfloat16", "float16"]
Resume = Literal["auto", "never"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of `qpipe train`.

    An optimizer step takes `batch_size` examples over all processes, or as many as have
    `step_tokens` tokens; each process cuts its share into forward passes of `forward_tokens`
    tokens, padding included, which leaves the gradient as it is. Raises UserError for a value out
    of its range.
    """

    targets: Path | tuple[Path, ...]  # several are mixed
    model: str
    out: Path
    revision: str | None = None
    mixture_weights: tuple[float, ...] = ()  # one a folder; none: by the folders' sizes
    method: str | None = None  # None: the folder's own; "sft" trains any folder on its tokens alone
    epochs: float = 1.0
    max_steps: int | None = None  # stop there, if the epochs would take longer
    learning_rate: float = 1e-5  # at its highest
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03  # share of the steps
    batch_size: int = 8
    step_tokens: int | None = None  # instead of batch_size
    forward_tokens: int = 8192
    pack: bool = True  # examples end to end, where the model keeps them apart; else padded
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0  # of matrices only
    max_grad_norm: float = 1.0
    precision: Precision = "auto"  # of the forward pass; the weights are trained in float32
    gradient_checkpointing: bool = False
    fsdp: bool = False  # spread the weights over the processes
    lora_rank: int | None = None  # None: all weights learn
    keep_adapter: bool = False  # save it by itself, not merged
    eval_fraction: float = 0.0  # share of the examples that is held out
    eval_every: int | None = None  # steps; before the first and after the last in any case
    eval_command: str | None = None  # run on a model folder at each evaluation
    track: tuple[TrackerName, ...] = ()  # that show what log.jsonl holds
    save_every: int | None = 500  # steps between checkpoints
    keep_checkpoints: int = 2
    resume: Resume = "auto"  # from the latest checkpoint, if there is one
    seed: int = 0
    verify: bool = True  # the hash of every shard, when the targets are opened

    @property
    def folders(self) -> tuple[Path, ...]:
        """The target folders."""
        return self.targets if isinstance(self.targets, tuple) else (self.targets,)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed, is_allowed = _ALLOWED.get(field.name, _ANYTHING)
            if not is_allowed(value):
                option = option_of(field.name)
                raise UserError(f"{option} {value} cannot be used: give {allowed}")
        if is_remote(self.out):
            raise UserError(
                f"--out {self.out}: a model is trained in a local folder: give a path, and copy it "
                "when it is finished (`qpipe share` is for scores and targets)"
            )
        if self.eval_every is not None and self.eval_fraction == 0 and self.eval_command is None:
            raise UserError(
                "--eval-every needs held-out examples: give --eval-fraction too, or --eval-command"
            )
        if self.eval_command is not None:
            parse_command(self.eval_command)
        check_trackers(self.track)
        if self.mixture_weights:
            if len(self.mixture_weights) != len(self.folders):
                raise UserError(
                    f"--mixture-weights: {len(self.mixture_weights)} given for "
                    f"{len(self.folders)} folders of targets: give one for each, as in 3,1"
                )
            shares_of(self.mixture_weights)
        if self.fsdp and self.optimizer != "adamw":
            raise UserError(
                f"--fsdp: the moments of --optimizer {self.optimizer} cannot be spread over "
                "processes: give adamw"
            )
        if self.fsdp and self.precision == "float16":
            raise UserError("--fsdp has no loss scaling for --precision float16: give bfloat16")
        if self.keep_adapter and self.lora_rank is None:
            raise UserError("--keep-adapter needs an adapter: give --lora-rank too")


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
    "optimizer": (
        ", ".join(get_args(OptimizerName)),
        lambda value: value in get_args(OptimizerName),
    ),
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
