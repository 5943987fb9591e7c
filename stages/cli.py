"""The command line: options and their words. What a command does is in the module it imports.

Nothing heavy is imported before a command runs, so that `qpipe --help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .. import __version__
from .quiet import quiet_libraries

_FOLDER = click.Path(path_type=Path)


class _Command(click.Command):
    """A command whose options may take several values after one name, as in `--scores a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        spread: list[str] = []
        current = None
        for argument in args:
            name = argument.partition("=")[0]
            if argument.startswith("-") and argument != "-":
                current = name if name in several else None
            elif current is not None and spread[-1] != current:
                spread.append(current)
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options of a YAML file as defaults, so that the command line wins."""
    if path is None:
        return
    import yaml

    try:
        config = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"--config {path}: cannot be read: {error}") from error
    if isinstance(config, dict) and config.keys() & cli.commands.keys():
        config = config.get(ctx.info_name) or {}
    if not isinstance(config, dict):
        raise click.ClickException(f"--config {path}: it must hold options, as in `top-k: 64`")
    ctx.default_map = dict(_default(ctx, path, str(key), value) for key, value in config.items())


def _default(ctx: click.Context, path: Path, key: str, value: Any) -> tuple[str, Any]:
    """The parameter that a key of a config file means, and its value as click takes it."""
    option = "--" + key.replace("_", "-")
    for parameter in ctx.command.params:
        if option in parameter.opts and option != "--config" and parameter.name is not None:
            values = [f"{name}={one}" for name, one in value.items()] if _is_map(value) else value
            values = values if isinstance(values, list) else [values]
            if any(isinstance(one, list | dict | None) for one in values):
                raise click.ClickException(f"--config {path}: {option} is no value: {value!r}")
            if not parameter.multiple and (_is_map(value) or isinstance(value, list)):
                raise click.ClickException(f"--config {path}: {option} takes one value: {value!r}")
            words = [str(one) for one in values]
            return parameter.name, words if parameter.multiple else words[0]
    raise click.ClickException(f"--config {path}: `{ctx.command_path}` has no option {option}")


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _config_option(command: Any) -> Any:
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file of options (`top-k: 64`), or of one section a command (`score: {…}`). "
        "The command line wins.",
    )(command)


def _check_parent(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is no folder", ctx, parameter)
    return path


def _log_option(command: Any) -> Any:
    return click.option(
        "--log-json",
        type=click.Path(path_type=Path, dir_okay=False, writable=True),
        callback=_check_parent,
        default=None,
        metavar="FILE",
        help="Append what the run did to this file, as a JSON line.",
    )(command)


def _teacher_options(command: Any) -> Any:
    options = (
        click.option(
            "--teacher",
            type=_FOLDER,
            default=None,
            metavar="DIR",
            help="Scores of the same examples under another model: `qpipe score --at`.",
        ),
        click.option(
            "--temperature", type=float, default=1.0, help="That the base prior is read at."
        ),
        click.option(
            "--teacher-temperature", type=float, default=1.0, help="That the teacher is read at."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _one_of(*values: str) -> click.Choice:
    return click.Choice(values)


class _InOrder(click.Group):
    """Commands in the order of the flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"max_content_width": 96, "show_default": True})
@click.version_option(__version__, prog_name="qpipe")
def cli() -> None:
    """Offline soft targets for supervised fine-tuning.

    \b
    qpipe score          demonstrations -> scores/    a model's top-k log-probabilities (GPU)
    qpipe build-targets  scores/        -> targets/   sparse target distributions
    qpipe train          targets/       -> run/       a fine-tuned model

    Each command takes a folder and makes a folder. Run again after a crash, score and build-targets
    go on where they stopped and train starts over; run again when done, they do nothing.
    """


@cli.command(cls=_Command)
@click.option("--model", required=True, help="Base model: a folder, or a name on the hub.")
@click.option(
    "--demonstrations",
    multiple=True,
    metavar="FILE...",
    help="JSON lines (also .gz, .zst), parquet, Arrow, or a Hugging Face data set name or folder.",
)
@click.option(
    "--at",
    type=_FOLDER,
    default=None,
    metavar="DIR",
    help="Instead of demonstrations: the examples of this score folder, made with the same "
    "tokenizer; also stores this model's log-probabilities at the ids it holds.",
)
@click.option("--out", required=True, type=_FOLDER, help="Folder to make.")
@click.option(
    "--engine",
    type=_one_of("auto", "vllm", "transformers"),
    default="auto",
    help="What runs the model; auto is vLLM where it is installed.",
)
@click.option("--top-k", type=int, default=64, help="Entries kept of each distribution.")
@click.option(
    "--max-length",
    type=int,
    default=None,
    metavar="TOKENS",
    help="Longest demonstration.  [default: the model's limit, at most 4096]",
)
@click.option(
    "--too-long",
    type=_one_of("reject", "cut"),
    default="reject",
    help="What happens to a longer one; either is counted.",
)
@click.option(
    "--format",
    "format",
    default="auto",
    type=_one_of("auto", "messages", "sharegpt", "alpaca", "prompt-completion"),
    help="What a row looks like; auto recognises it row by row.",
)
@click.option(
    "--template",
    default="tokenizer",
    metavar="tokenizer|none|FILE",
    help="Chat template: the tokenizer's own, none, or a Jinja file.",
)
@click.option(
    "--supervise",
    type=_one_of("assistant", "last", "all"),
    default="assistant",
    help="Which tokens count: every assistant turn, the last one, or all tokens.",
)
@click.option("--strict", is_flag=True, help="Stop at the first unusable row.")
@click.option(
    "--dtype",
    type=_one_of("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="Number format; auto is the model's own on a GPU and float32 without.",
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@click.option("--shard-size", type=int, default=512, help="Demonstrations in a shard.")
@click.option(
    "--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (vLLM)."
)
@click.option(
    "--gpu-memory-utilization",
    type=float,
    default=0.8,
    help="Share of the GPU's memory that vLLM plans with.",
)
@_log_option
@_config_option
@click.pass_context
def score(
    ctx: click.Context,
    demonstrations: tuple[str, ...],
    at: Path | None,
    log_json: Path | None,
    **options: Any,
) -> None:
    """Score demonstrations under a base model's prior.

    Needs a model and demonstrations. For every supervised token it stores the token's
    log-probability and rank, the top-k ids and log-probabilities, and the mass outside them. A row
    that cannot be used goes to rejects.jsonl with its file, line and reason.

    With --at, a second model scores the very examples of a score folder, at its ids too, so that
    the two can be joined. How rows are read is then that folder's, and no option here.

    \b
    qpipe score --model Qwen/Qwen3-0.6B --demonstrations chats.jsonl --out scores/
    qpipe score --model Qwen/Qwen3-8B --at scores/ --out teacher/
    """
    from . import summary
    from .score import ScoreSettings, score
    from .score_at import ScoreAtSettings, score_at

    if at is not None:
        result = score_at(ScoreAtSettings(at=at, **_without_row_options(ctx, options)))
    elif demonstrations:
        result = score(ScoreSettings(demonstrations=demonstrations, **options))
    else:
        raise click.UsageError("give --demonstrations FILE, or --at DIR", ctx)
    summary.print_scores(options["out"], result)
    if log_json:
        summary.log_result(log_json, result)


def _without_row_options(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `score` but those that say how rows are read, which nobody may have given."""
    from .score import MODEL_OPTIONS

    kept = {}
    for name in ("demonstrations", *options):
        if name in MODEL_OPTIONS:
            kept[name] = options[name]
        elif ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(
                f"{option} goes with --demonstrations, not with --at: leave one of them out", ctx
            )
    return kept


@cli.command(cls=_Command)
@click.option("--scores", required=True, type=_FOLDER, help="Folder made by `qpipe score`.")
@click.option("--out", required=True, type=_FOLDER, help="Folder to make.")
@click.option(
    "--method",
    default=None,
    help="Target method; `qpipe methods` lists them.  [default: sft+kl, with --teacher target-sft]",
)
@click.option(
    "--form",
    default=None,
    metavar="live|frozen-target|frozen-weight",
    help="Form of a method that has several.  [default: its first]",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE...",
    help="Parameters of the method, as in lam=0.2.",
)
@_teacher_options
@click.option(
    "--top-p",
    type=float,
    default=0.99,
    help="Probability that the stored support holds at least, where top-k reaches it.",
)
@click.option(
    "--max-support",
    type=int,
    default=64,
    help="Most entries of that support; the observed token is kept besides.",
)
@_log_option
@_config_option
def build_targets(
    params: tuple[str, ...],
    method: str | None,
    form: str | None,
    log_json: Path | None,
    **options: Any,
) -> None:
    """Turn scores into sparse target distributions.

    Needs only a score folder: no model, no GPU. The target at each supervised token is
    Q = γ·(observed token) + (1-γ)·residual; the method says what γ and the residual are. What the
    targets can teach at best is printed, with a warning where that is not much.

    \b
    qpipe build-targets --scores scores/ --out targets/ --method gift --param beta=5
    qpipe build-targets --scores scores/ --teacher teacher/ --out targets/
    """
    from ..pipeline.methods import DEFAULT_METHOD, DEFAULT_METHOD_WITH_TEACHER, choose
    from . import summary
    from .build_targets import BuildSettings, build_targets

    given = dict(_name_and_value(param) for param in params)
    if len(given) < len(params):
        raise click.ClickException(f"--param {' '.join(params)}: a parameter is given twice")
    default = DEFAULT_METHOD_WITH_TEACHER if options["teacher"] else DEFAULT_METHOD
    choice = choose(method or default, form, given)
    result = build_targets(BuildSettings(choice=choice, **options))
    summary.print_targets(options["out"], result)
    if log_json:
        summary.log_result(log_json, result)


@cli.command(cls=_Command)
@click.option(
    "--targets", required=True, type=_FOLDER, help="Folder made by `qpipe build-targets`."
)
@click.option(
    "--model", required=True, help="Model to train, the scored one as a rule: a folder or a name."
)
@click.option("--out", required=True, type=_FOLDER, help="Folder to make: the trained model.")
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
    type=_one_of("cosine", "linear", "constant"),
    default="cosine",
    help="How the learning rate falls after the warm-up.",
)
@click.option("--warmup-ratio", type=float, default=0.03, help="Share of the steps that warm up.")
@click.option("--batch-size", type=int, default=8, help="Demonstrations in a forward pass.")
@click.option(
    "--gradient-accumulation", type=int, default=1, help="Forward passes in an optimizer step."
)
@click.option("--weight-decay", type=float, default=0.0, help="AdamW's, on matrices only.")
@click.option("--max-grad-norm", type=float, default=1.0, help="Clip gradients to this norm.")
@click.option(
    "--precision",
    type=_one_of("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="Of the forward pass; the weights stay float32. auto is bfloat16 on GPUs that have it.",
)
@click.option(
    "--lora-rank",
    type=int,
    default=None,
    help="Train LoRA adapters of this rank, merged when saved.  [default: all weights learn]",
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
@click.option("--seed", type=int, default=0, help="Of the sample order and of dropout.")
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@_config_option
def train(**options: Any) -> None:
    """Train a model on targets, without the prior.

    Needs a target folder and a model with the tokenizer that was scored. Runs on the CPU, on one
    GPU, or on several under torchrun. --out becomes a Hugging Face model folder, with log.jsonl and
    qpipe.json beside the weights.

    \b
    qpipe train --targets targets/ --model Qwen/Qwen3-0.6B --out run/ --eval-fraction 0.05
    """
    from ..trainer.loop import train
    from ..trainer.settings import TrainSettings
    from . import summary

    result = train(TrainSettings(**options))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a process
        summary.print_training(options["out"], result)


@cli.command(cls=_Command)
@click.argument("scores", type=_FOLDER)
@_teacher_options
@click.option("--all-forms", is_flag=True, help="Every form of each method, not its first alone.")
@_config_option
def compare_methods(all_forms: bool, **options: Any) -> None:
    """Compare what the targets of every method can teach at best.

    Reads a score folder once, with a teacher's where given, and writes nothing. For each method
    with its default parameters: what a model that learnt its targets perfectly would still pay, and
    how much of the demonstrations it would write itself.

    \b
    qpipe compare-methods scores/ --teacher teacher/
    """
    from .compare_methods import compare_methods
    from .summary import print_comparison

    print_comparison(compare_methods(all_forms=all_forms, **options))


@cli.command()
def methods() -> None:
    """List the target methods.

    For each: its trust γ and residual π̃ of the target γ·(observed token) + (1-γ)·π̃, its scale s of
    the loss, its parameters, its forms, what the targets hold, and the paper. p is the student, b
    the base prior, q the teacher; y the observed token.
    """
    from .summary import print_methods

    print_methods()


def _name_and_value(param: str) -> tuple[str, str]:
    name, equals, value = param.partition("=")
    if not (name and equals and value):
        raise click.ClickException(f"--param {param}: give a name and a value, as in lam=0.1")
    return name, value


def main() -> None:
    """Run the command line: exit status 2 and one line for what the user can mend."""
    try:
        sys.exit(_run())
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "Stopped: finished shards are kept, the same command goes on after them "
            "(`qpipe train` starts over).",
            err=True,
        )
        sys.exit(130)


def _run() -> int:
    from ..pipeline.errors import UserError

    quiet_libraries()
    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "qpipe"
        message = f"{error.format_message()} (`{where} --help` tells the options)"
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2
