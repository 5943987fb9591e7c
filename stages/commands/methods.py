"""`qpipe methods` and `qpipe compare-methods`: options, call, output."""

from typing import Any

import click

from ..build_targets.settings import BuildSettings
from .options import FOLDER, Command, config_option, options_of


@click.command(cls=Command)
@click.argument("scores", type=FOLDER)
@options_of(
    BuildSettings,
    only=(
        "teacher",
        "teacher_weights",
        "teacher_mean",
        "tokenizer",
        "teacher_column",
        "teacher_values",
        "demonstrations",
        "temperature",
        "teacher_temperature",
    ),
)
@click.option(
    "--all-forms", is_flag=True, help="Compare every form of each method instead of its first form."
)
@config_option
def compare_methods(all_forms: bool, **options: Any) -> None:
    """Compare the best results that the targets of each method allow.

    Reads a score folder, and a teacher's if given, and writes nothing. For each method with its
    default parameters, shows the NLL of a model that fits its targets exactly, and the share of
    the demonstrations that this model reproduces.

    \b
    qpipe compare-methods scores/ --teacher teacher/
    """
    from ..build_targets.compare_methods import compare_methods
    from .ceiling_summary import print_comparison

    print_comparison(compare_methods(all_forms=all_forms, **options))


@click.command()
def methods() -> None:
    """List the target methods.

    For each method, shows the trust γ and residual π̃ of its target γ·(observed token) +
    (1-γ)·π̃, the scale s of its loss, its parameters and forms, what its targets store, and the
    paper. p is the student, b the base, q the teacher, and y the observed token.
    """
    from ...pipeline.methods.words import table

    for row in table():
        residual, scale = row["residual"], row["scale"]
        click.echo(f"{row['name']}  ({row['source']})")
        target = f"γ = {row['trust']}" + (f"   π̃ {residual}" if residual != "-" else "")
        click.echo(f"    {target}" + (f"   s = {scale}" if scale != "1" else ""))
        for name in ("parameters", "forms", "needs"):
            if row[name] != "-":
                click.echo(f"    {name}: {row[name]}")
