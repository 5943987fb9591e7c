"""The words of `qpipe train`."""

import os
from typing import Any

import click

from .options import FOLDER, Command, config_option, one_of


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(
            f"{text} is no list of numbers: give one a folder, as in 3,1", ctx, parameter
        ) from error


@click.command(cls=Command)
@click.option(
    "--targets",
    required=True,
    multiple=True,
    type=FOLDER,
    metavar="DIR",
    help="Folder made by `qpipe build-targets`. Several are mixed: each step takes of all.",
)
@click.option(
    "--mixture-weights",
    callback=_weights,
    default=None,
    metavar="W,W,…",
    help="Shares of the samples, one a folder, as in 3,1.  [default: the folders' sizes]",
)
@click.option(
    "--model", required=True, help="Model to train, the scored one as a rule: a folder or a name."
)
@click.option("--out", required=True, type=FOLDER, help="Folder to make: the trained model.")
@click.option(
    "--method",
    default=None,
    metavar="sft",
    help="Train on the observed tokens alone, on any folder.  [default: the folder's method]",
)
@click.option("--epochs", type=float, default=1.0, help="Passes over the targets.")
@click.option("--max-steps", type=int, default=None, help="Stop after this many optimizer steps.")
@click.option("--learning-rate", type=float, default=1e-5, help="Highest learning rate.")
@click.option(
    "--schedule",
    type=one_of("cosine", "linear", "constant"),
    default="cosine",
    help="How the learning rate falls after the warm-up.",
)
@click.option("--warmup-ratio", type=float, default=0.03, help="Share of the steps that warm up.")
@click.option(
    "--batch-size",
    type=int,
    default=8,
    help="Demonstrations in an optimizer step, over all processes.",
)
@click.option(
    "--step-tokens",
    type=int,
    default=None,
    metavar="TOKENS",
    help="Instead: as many demonstrations as have so many tokens.",
)
@click.option(
    "--forward-tokens",
    type=int,
    default=8192,
    help="Most tokens of a forward pass, padding included; the gradient stays the same.",
)
@click.option(
    "--pack/--no-pack",
    default=True,
    help="Put demonstrations end to end in a forward pass, a beginning that all share once; or pad "
    "them, as happens to a model that would mix them.",
)
@click.option(
    "--optimizer",
    type=one_of("adamw", "adamw-8bit", "adamw-paged-8bit"),
    default="adamw",
    help="8-bit ones, for less memory, are those of bitsandbytes: pip install 'qpipe[8bit]'.",
)
@click.option(
    "--weight-decay",
    type=float,
    default=0.0,
    help="On matrices only: not on biases, norms and embeddings.",
)
@click.option("--max-grad-norm", type=float, default=1.0, help="Clip gradients to this norm.")
@click.option(
    "--precision",
    type=one_of("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="Of the forward pass; the weights stay float32. auto is bfloat16 on GPUs that have it.",
)
@click.option(
    "--lora-rank",
    type=int,
    default=None,
    help="Train LoRA adapters of this rank, merged when saved.  [default: all weights learn]",
)
@click.option(
    "--keep-adapter", is_flag=True, help="Save the adapter by itself, for peft: not merged."
)
@click.option(
    "--fsdp",
    is_flag=True,
    help="Under torchrun: spread weights, gradients and moments over the processes.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, about a third slower.")
@click.option(
    "--eval-fraction", type=float, default=0.0, help="Share of the demonstrations held out."
)
@click.option(
    "--eval-every",
    type=int,
    default=None,
    metavar="STEPS",
    help="Evaluate this often, besides before and after.",
)
@click.option(
    "--eval-command",
    default=None,
    metavar="COMMAND",
    help="Run this before, after and every --eval-every steps, as in 'python my_eval.py "
    "{checkpoint}': {checkpoint} becomes a model folder, removed afterwards. The numbers of the "
    "JSON object on its last line of output are logged. Where it fails, a warning is. The other "
    "processes wait for it.",
)
@click.option(
    "--track",
    type=one_of("tensorboard", "wandb"),
    multiple=True,
    help="Show what log.jsonl gets there too: pip install 'qpipe[tensorboard]' or 'qpipe[wandb]'.",
)
@click.option(
    "--save-every", type=int, default=500, metavar="STEPS", help="Write a checkpoint this often."
)
@click.option("--keep-checkpoints", type=int, default=2, help="Checkpoints that stay, the latest.")
@click.option(
    "--resume",
    type=one_of("auto", "never"),
    default="auto",
    help="Go on from the latest checkpoint in --out, or start over.",
)
@click.option("--seed", type=int, default=0, help="Of the sample order and of dropout.")
@click.option(
    "--verify/--no-verify", default=True, help="Compare the hash of every shard before training."
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@config_option
def train(**options: Any) -> None:
    """Train a model on targets, without the prior.

    Needs a target folder and a model with the tokenizer that was scored. Runs on the CPU, on one
    GPU, or on several under torchrun. --out becomes a Hugging Face model folder, with log.jsonl and
    qpipe.json beside the weights.

    \b
    qpipe train --targets targets/ --model Qwen/Qwen3-0.6B --out run/ --eval-fraction 0.05
    """
    from ...trainer.run.train import train
    from ...trainer.settings import TrainSettings
    from .training_summary import print_training

    result = train(TrainSettings(**options))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a process
        print_training(options["out"], result)
