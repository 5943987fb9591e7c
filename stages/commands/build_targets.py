"""The words of `qpipe build-targets`."""

from typing import Any

import click

from .options import (
    FOLDER,
    Command,
    config_option,
    execution_options,
    one_of,
    out_options,
    take_execution,
    take_place,
    teacher_options,
)


@click.command(cls=Command)
@click.option("--scores", required=True, type=FOLDER, help="Folder made by `qpipe score`.")
@out_options
@click.option(
    "--method",
    default=None,
    help="Target method; `qpipe methods` lists them.  [default: sft+kl, with --teacher kd]",
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
@teacher_options
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
@click.option(
    "--precision",
    type=one_of("uint8", "float16", "float32"),
    default="uint8",
    help="Of the stored log-probabilities; in uint8 none above 1e-6 is off by more than 16 %.",
)
@execution_options
@config_option
def build_targets(
    params: tuple[str, ...],
    method: str | None,
    form: str | None,
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
    from ...pipeline.methods.table import DEFAULT_METHOD, DEFAULT_METHOD_WITH_TEACHER, choose
    from ..build_targets.stage import BuildSettings, build_targets
    from .folder_summary import report

    given = dict(_name_and_value(param) for param in params)
    if len(given) < len(params):
        raise click.ClickException(f"--param {' '.join(params)}: a parameter is given twice")
    default = DEFAULT_METHOD_WITH_TEACHER if options["teacher"] else DEFAULT_METHOD
    choice = choose(method or default, form, given)
    take_place(options)
    execution = take_execution(options)
    result = build_targets(BuildSettings(choice=choice, **options), execution)
    report(options["out"], options["in_store"], result, execution.log_json)


def _name_and_value(param: str) -> tuple[str, str]:
    name, equals, value = param.partition("=")
    if not (name and equals and value):
        raise click.ClickException(f"--param {param}: give a name and a value, as in lam=0.1")
    return name, value
