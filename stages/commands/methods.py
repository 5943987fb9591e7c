"""The words of `qpipe methods` and `qpipe compare-methods`."""

from typing import Any

import click

from ..build_targets.settings import BuildSettings
from .options import FOLDER, Command, config_option, options_of


@click.command(cls=Command)
@click.argument("scores", type=FOLDER)
@options_of(BuildSettings, only=("teacher", "temperature", "teacher_temperature"))
@click.option("--all-forms", is_flag=True, help="Every form of each method, not its first alone.")
@config_option
def compare_methods(all_forms: bool, **options: Any) -> None:
    """Compare what the targets of every method can teach at best.

    Reads a score folder, with a teacher's where given, and writes nothing. For each method
    with its default parameters: what a model that learnt its targets perfectly would still pay, and
    how much of the demonstrations it would write itself.

    \b
    qpipe compare-methods scores/ --teacher teacher/
    """
    from ..build_targets.compare_methods import compare_methods
    from .ceiling_summary import print_comparison

    print_comparison(compare_methods(all_forms=all_forms, **options))


@click.command()
def methods() -> None:
    """List the target methods.

    For each: its trust γ and residual π̃ of the target γ·(observed token) + (1-γ)·π̃, its scale s of
    the loss, its parameters, its forms, what the targets hold, and the paper. p is the student, b
    the base prior, q the teacher; y the observed token.
    """
    from .methods_summary import print_methods

    print_methods()
