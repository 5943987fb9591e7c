"""`qpipe train`: options, call, output."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...trainer.settings import TrainSettings
from .options import Command, config_option, options_of
from .tables import already, print_table

if TYPE_CHECKING:
    from ...trainer.run.loop import TrainResult


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(
            f"{text} is not a list of numbers: give one per folder, as in 3,1", ctx, parameter
        ) from error


def _names(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


@click.command(cls=Command)
@options_of(
    TrainSettings,
    mixture_weights={"multiple": False, "type": str, "callback": _weights},
    lora_targets={"multiple": False, "type": str, "callback": _names},
)
@config_option
def train(**options: Any) -> None:
    """Train a model on targets; no base model is needed.

    Needs a target folder and a model with the tokenizer of the scores. Runs on a CPU, on one
    GPU, or on several under torchrun. --out becomes a Hugging Face model folder with log.jsonl
    and qpipe.json beside the weights.

    \b
    qpipe train --targets targets/ --model Qwen/Qwen3-0.6B --out run/ --eval-fraction 0.05
    """
    from ...trainer.run.train import train

    result = train(TrainSettings(**options))
    if os.environ.get("RANK", "0") == "0":  # torchrun runs this command in each process
        print_training(options["out"], result)


def print_training(folder: Path, result: "TrainResult") -> None:
    """Print a summary of a training run."""
    speed = result.tokens / max(result.seconds, 1e-9)
    rows = [
        ("model", f"{folder}{already(result.was_done)}"),
        ("steps", f"{result.steps:,} over {result.examples:,} demonstrations"),
        ("supervised tokens", f"{result.tokens:,}"),
        ("speed", f"{speed:,.0f} supervised tokens/s"),
    ]
    for when, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            words = f"target loss {evaluation.target_loss:.4f}, NLL {evaluation.nll:.4f}"
            if evaluation.kl_to_base is not None:
                words += f", KL to base {evaluation.kl_to_base:z.4f}"
            words += f", entropy {evaluation.entropy:.4f}"
            rows.append((f"held out, {when}", words))
    print_table(rows)
