"""The settings of `qpipe train`."""

import shlex
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..pipeline.errors import UserError
from ..pipeline.options import Range, about, check, option
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


_COUNT = Range(1, 10**9)
_POSITIVE = Range(0, 10**6, above=True)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of `qpipe train`.

    An optimizer step takes `batch_size` examples over all processes, or as many as have
    `step_tokens` tokens; each process cuts its share into forward passes of `forward_tokens`
    tokens, padding included, which leaves the gradient as it is. Raises UserError for a value out
    of its range.
    """

    targets: Path | tuple[Path, ...] = field(
        metadata=about(
            "Folder made by `qpipe build-targets`. Several are mixed: each step takes of all.",
            metavar="DIR",
            in_identity=False,  # known by its content instead, as are the model and its revision
        )
    )
    mixture_weights: tuple[float, ...] = field(
        default=(),
        kw_only=True,
        metadata=about(
            "Shares of the samples, one a folder, as in 3,1.  [default: the folders' sizes]",
            metavar="W,W,…",
        ),
    )
    model: str = field(
        metadata=about(
            "Model to train, the scored one as a rule: a folder or a name.", in_identity=False
        )
    )
    out: Path = field(metadata=about("Folder to make: the trained model.", in_identity=False))
    method: str | None = option(
        None,
        "Train on the observed tokens alone, on any folder.  [default: the folder's method]",
        metavar="sft",
    )
    epochs: float = option(1.0, "Passes over the targets.", range=_POSITIVE)
    max_steps: int | None = option(None, "Stop after this many optimizer steps.", range=_COUNT)
    learning_rate: float = option(1e-5, "Highest learning rate.", range=_POSITIVE)
    schedule: Schedule = option("cosine", "How the learning rate falls after the warm-up.")
    warmup_ratio: float = option(0.03, "Share of the steps that warm up.", range=Range(0, 1))
    batch_size: int = option(
        8, "Demonstrations in an optimizer step, over all processes.", range=_COUNT
    )
    step_tokens: int | None = option(
        None,
        "Instead: as many demonstrations as have so many tokens.",
        metavar="TOKENS",
        range=_COUNT,
    )
    forward_tokens: int = option(
        8192,
        "Most tokens of a forward pass, padding included; the gradient stays the same.",
        range=_COUNT,
        in_identity=False,
    )
    pack: bool = option(
        True,
        "Put demonstrations end to end in a forward pass, a beginning that all share once; or "
        "pad them, as happens to a model that would mix them.",
        in_identity=False,
    )
    optimizer: OptimizerName = option(
        "adamw",
        "8-bit ones, for less memory, are those of bitsandbytes: pip install 'qpipe[8bit]'.",
    )
    weight_decay: float = option(
        0.0, "On matrices only: not on biases, norms and embeddings.", range=Range(0, below=True)
    )
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.", range=Range(0, above=True))
    precision: Precision = option(
        "auto",
        "Of the forward pass; the weights stay float32. auto is bfloat16 on GPUs that have it.",
    )
    lora_rank: int | None = option(
        None,
        "Train LoRA adapters of this rank, merged when saved.  [default: all weights learn]",
        range=Range(1, 1024),
    )
    keep_adapter: bool = option(False, "Save the adapter by itself, for peft: not merged.")
    fsdp: bool = option(
        False,
        "Under torchrun: spread weights, gradients and moments over the processes.",
        in_identity=False,
    )
    gradient_checkpointing: bool = option(
        False, "Less memory, about a third slower.", in_identity=False
    )
    eval_fraction: float = option(
        0.0, "Share of the demonstrations held out.", range=Range(0, 1, below=True)
    )
    eval_every: int | None = option(
        None,
        "Evaluate this often, besides before and after.",
        metavar="STEPS",
        range=_COUNT,
        in_identity=False,
    )
    eval_command: str | None = option(
        None,
        "Run this before, after and every --eval-every steps, as in 'python my_eval.py "
        "{checkpoint}': {checkpoint} becomes a model folder, removed afterwards. The numbers "
        "of the JSON object on its last line of output are logged. Where it fails, a warning "
        "is. The other processes wait for it.",
        metavar="COMMAND",
        in_identity=False,
    )
    track: tuple[TrackerName, ...] = option(
        (),
        "Show what log.jsonl gets there too: pip install 'qpipe[tensorboard]' or 'qpipe[wandb]'.",
        in_identity=False,
    )
    save_every: int | None = option(
        500, "Write a checkpoint this often.", metavar="STEPS", range=_COUNT, in_identity=False
    )
    keep_checkpoints: int = option(
        2, "Checkpoints that stay, the latest.", range=_COUNT, in_identity=False
    )
    resume: Resume = option(
        "auto", "Go on from the latest checkpoint in --out, or start over.", in_identity=False
    )
    seed: int = option(0, "Of the sample order and of dropout.", range=Range(0, 2**32 - 1))
    verify: bool = option(
        True, "Compare the hash of every shard before training.", in_identity=False
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the hub.", in_identity=False
    )

    @property
    def folders(self) -> tuple[Path, ...]:
        """The target folders."""
        return self.targets if isinstance(self.targets, tuple) else (self.targets,)

    def __post_init__(self) -> None:
        check(self)
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
