"""`qpipe build-targets`: options, call, output."""

from typing import Any

import click

from ..build_targets.settings import BuildSettings
from ..execution.settings import Execution
from .options import (
    Command,
    config_option,
    execution_options,
    options_of,
    out_options,
    take,
    take_place,
)


@click.command(cls=Command)
@options_of(BuildSettings, only=("scores",))
@out_options
@click.option(
    "--method",
    default=None,
    help="Target method; `qpipe methods` lists them, and `qpipe compare-methods` shows what each "
    "can teach.  [default: sft+kl, or kd with --teacher]",
)
@click.option(
    "--form",
    default=None,
    metavar="live|frozen-target|frozen-weight",
    help="Form of the method.  [default: its first form]",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE...",
    help="Parameters of the method, for example lam=0.2.",
)
@options_of(BuildSettings, without=("scores",))
@execution_options
@config_option
def build_targets(
    params: tuple[str, ...], method: str | None, form: str | None, **options: Any
) -> None:
    """Build sparse target distributions from scores.

    Needs a score folder, but no model and no GPU. The target at each supervised position is Q =
    γ·(observed token) + (1-γ)·residual, where the method defines γ and the residual. Also
    prints the best result that the targets allow, with a warning if it is low.

    \b
    qpipe build-targets --scores scores/ --out targets/ --method gift --param beta=5
    qpipe build-targets --scores scores/ --teacher teacher/ --out targets/
    """
    from ...pipeline.methods.table import DEFAULT_METHOD, DEFAULT_METHOD_WITH_TEACHER, choose
    from ..build_targets.stage import build_targets
    from .folder_summary import report

    given = dict(_name_and_value(param) for param in params)
    if len(given) < len(params):
        raise click.ClickException(f"--param {' '.join(params)}: a parameter is given twice")
    default = DEFAULT_METHOD_WITH_TEACHER if options["teacher"] else DEFAULT_METHOD
    choice = choose(method or default, form, given)
    take_place(options)
    execution = take(Execution, options)
    result = build_targets(BuildSettings(choice=choice, **options), execution)
    report(options["out"], options["in_store"], result, execution.log_json)


def _name_and_value(param: str) -> tuple[str, str]:
    name, equals, value = param.partition("=")
    if not (name and equals and value):
        raise click.ClickException(f"--param {param}: give a name and a value, as in lam=0.1")
    return name, value
