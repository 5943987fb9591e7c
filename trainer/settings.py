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


CHECKPOINT = "{checkpoint}"


def parse_command(command: str) -> list[str]:
    """The words of an evaluation command. Raises UserError where it cannot be run."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--eval-command {command}: cannot be read: {error}") from error
    if not any(CHECKPOINT in word for word in words):
        raise UserError(
            f"--eval-command {command}: lacks {CHECKPOINT}, which is replaced by the model folder: "
            f"add it, as in 'python my_eval.py {CHECKPOINT}'"
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
            "Target folder made by `qpipe build-targets`. Several folders are mixed at every step.",
            metavar="DIR",
            in_identity=False,  # identified by its content, as are the model and its revision
        )
    )
    mixture_weights: tuple[float, ...] = field(
        default=(),
        kw_only=True,
        metadata=about(
            "Sampling weight of each folder, for example 3,1.  [default: the sizes of the folders]",
            metavar="W,W,…",
        ),
    )
    model: str = field(
        metadata=about(
            "Model to train, usually the scored one: a local folder or a name on the Hub. With"
            " --lora-rank also the folder of an adapter, which is trained further.",
            in_identity=False,
        )
    )
    out: Path = field(metadata=about("Output folder for the trained model.", in_identity=False))
    method: str | None = option(
        None,
        "Set to sft to train on the observed tokens alone, with any target folder.  "
        "[default: the method of the folder]",
        metavar="sft",
    )
    param_end: tuple[str, ...] = field(
        default=(),
        kw_only=True,
        metadata=about(
            "Parameters of a live method at the last step, for example eta=1: they change "
            "linearly from those of the folder.",
            metavar="NAME=VALUE...",
            in_identity=False,  # part of it where it is given
        ),
    )
    epochs: float = option(1.0, "Number of passes over the targets.", range=_POSITIVE)
    max_steps: int | None = option(None, "Maximum number of optimizer steps.", range=_COUNT)
    learning_rate: float = option(1e-5, "Peak learning rate.", range=_POSITIVE)
    schedule: Schedule = option("cosine", "Learning rate schedule after the warm-up.")
    warmup_ratio: float = option(
        0.03, "Fraction of the steps used for the warm-up.", range=Range(0, 1)
    )
    batch_size: int = option(
        8, "Demonstrations per optimizer step, over all processes.", range=_COUNT
    )
    step_tokens: int | None = option(
        None,
        "Tokens per optimizer step; replaces --batch-size.",
        metavar="TOKENS",
        range=_COUNT,
    )
    forward_tokens: int = option(
        8192,
        "Maximum number of tokens per forward pass, padding included. It does not change "
        "the gradient.",
        range=_COUNT,
        in_identity=False,
    )
    pack: bool = option(
        True,
        "Pack demonstrations into one sequence and compute a prefix that they share once."
        " With --no-pack, and for models that would mix them, demonstrations are padded.",
        in_identity=False,
    )
    optimizer: OptimizerName = option(
        "adamw",
        "Optimizer. The 8-bit variants need less memory, and bitsandbytes: pip install "
        "'qpipe[8bit]'.",
    )
    weight_decay: float = option(
        0.0,
        "Weight decay of matrices. Biases, norms and embeddings are not decayed.",
        range=Range(0, below=True),
    )
    max_grad_norm: float = option(
        1.0, "Maximum norm of the gradient, which is clipped to it.", range=Range(0, above=True)
    )
    precision: Precision = option(
        "auto",
        "Precision of the forward pass; weights stay in float32. auto is bfloat16 on GPUs"
        " that support it.",
    )
    lora_rank: int | None = option(
        None,
        "Rank of LoRA adapters, which are merged into the model when it is saved.  "
        "[default: train all weights]",
        range=Range(1, 1024),
    )
    lora_alpha: float | None = option(
        None,
        "Alpha of the adapters, which are scaled by alpha/rank.  [default: twice the rank]",
        range=_POSITIVE,
        in_identity=False,  # part of it where it is given
    )
    lora_targets: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Layers that get an adapter, by the last word of their names, for example"
            " q_proj,v_proj.  [default: all linear layers and experts]",
            metavar="NAME,NAME,…",
            in_identity=False,
        ),
    )
    keep_adapter: bool = option(
        False, "Save the LoRA adapter in peft's format instead of merging it."
    )
    fsdp: bool = option(
        False,
        "Shard weights, gradients and optimizer states over the processes of torchrun.",
        in_identity=False,
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass: less memory, about a third slower.",
        in_identity=False,
    )
    compile: bool = option(
        False,
        "Compile the layers of the model with torch.compile: up to a minute at the first step,"
        " then faster steps on a GPU.",
        in_identity=False,
    )
    eval_fraction: float = option(
        0.0,
        "Fraction of the demonstrations held out for evaluation.",
        range=Range(0, 1, below=True),
    )
    eval_every: int | None = option(
        None,
        "Steps between evaluations, in addition to those before and after training.",
        metavar="STEPS",
        range=_COUNT,
        in_identity=False,
    )
    eval_command: str | None = option(
        None,
        "Command to run at each evaluation, for example 'python my_eval.py {checkpoint}'."
        " {checkpoint} is replaced by a temporary model folder. The numbers of the JSON "
        "object on the last line of output are logged. If the command fails, a warning is"
        " logged. Other processes wait for it.",
        metavar="COMMAND",
        in_identity=False,
    )
    track: tuple[TrackerName, ...] = option(
        (),
        "Also log to TensorBoard or Weights & Biases: pip install 'qpipe[tensorboard]' or"
        " 'qpipe[wandb]'.",
        in_identity=False,
    )
    save_every: int | None = option(
        500, "Steps between checkpoints.", metavar="STEPS", range=_COUNT, in_identity=False
    )
    keep_checkpoints: int = option(
        2, "Number of latest checkpoints to keep.", range=_COUNT, in_identity=False
    )
    resume: Resume = option(
        "auto", "Resume from the latest checkpoint in --out, or start over.", in_identity=False
    )
    seed: int = option(
        0, "Seed for the order of samples and for dropout.", range=Range(0, 2**32 - 1)
    )
    verify: bool = option(
        True, "Verify the hash of every shard before training.", in_identity=False
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the Hub.", in_identity=False
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
        for name in self.track:
            if find_spec(name) is None:
                raise UserError(f"--track {name} needs {name}: pip install 'qpipe[{name}]'")
        if self.mixture_weights:
            if len(self.mixture_weights) != len(self.folders):
                raise UserError(
                    f"--mixture-weights: {len(self.mixture_weights)} given for "
                    f"{len(self.folders)} folders of targets: give one for each, as in 3,1"
                )
            shares_of(self.mixture_weights)
        if self.fsdp and self.optimizer != "adamw":
            raise UserError(
                f"--fsdp: the moments of --optimizer {self.optimizer} cannot be sharded over "
                "processes: give adamw"
            )
        if self.fsdp and self.precision == "float16":
            raise UserError("--fsdp has no loss scaling for --precision float16: give bfloat16")
        for name in ("keep_adapter", "lora_alpha", "lora_targets"):
            if getattr(self, name) and self.lora_rank is None:
                shown = name.replace("_", "-")
                raise UserError(f"--{shown} needs an adapter: give --lora-rank too")
