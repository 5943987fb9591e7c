"""The words of `qpipe train`."""

import os
from typing import Any

import click

from ...trainer.settings import TrainSettings
from .options import Command, config_option, options_of


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(
            f"{text} is not a list of numbers: give one a folder, as in 3,1", ctx, parameter
        ) from error


@click.command(cls=Command)
@options_of(TrainSettings, mixture_weights={"multiple": False, "type": str, "callback": _weights})
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
    from .training_summary import print_training

    result = train(TrainSettings(**options))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a process
        print_training(options["out"], result)
