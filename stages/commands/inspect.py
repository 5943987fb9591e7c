"""The words of `qpipe inspect`."""

import json
from pathlib import Path
from typing import Any

import click

from .options import FOLDER, Command, config_option, model_option


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--against",
    type=FOLDER,
    default=None,
    metavar="DIR",
    help="Another folder of the same demonstrations: shows where the two differ most.",
)
@click.option(
    "--scores",
    type=FOLDER,
    default=None,
    metavar="DIR",
    help="The base's scores beside targets: adds base, gain, kl.",
)
@click.option("--id", "ids", multiple=True, metavar="ID...", help="Show these examples.")
@click.option("--random", type=click.IntRange(1), default=None, help="Show so many, drawn.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the drawing.")
@click.option(
    "--sort",
    default=None,
    metavar="lowest-trust|largest-kl|…",
    help="Show those with the lowest or highest mean of a measure.",
)
@click.option("-n", "examples", type=click.IntRange(0), default=None, help="So many.  [default: 3]")
@click.option(
    "--colour-by",
    "--color-by",
    default=None,
    metavar="MEASURE",
    help="What colours a token.  [default: trust if it varies, of scores base, of two folders tv]",
)
@click.option(
    "--alternatives",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="List the K most probable tokens at each supervised position.",
)
@model_option
@click.option("--color/--no-color", default=None, help="[default: on a terminal, not if NO_COLOR]")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON value.")
@config_option
def inspect(
    folder: Path, alternatives: int, color: bool | None, as_json: bool, **options: Any
) -> None:
    """Look at scores or targets: a summary, then examples, token by token.

    Measures: trust, weight, target, base, gain (target - base), nll, entropy, rank, support, kept;
    with --scores or --against also kl; with --against tv (total variation). A dim token is not
    supervised.

    \b
    qpipe inspect targets/ --sort lowest-trust -n 5 --alternatives 3
    qpipe inspect targets/ --scores scores/ --sort largest-kl
    qpipe inspect gift/ --against dft/
    """
    from ..looking.inspect import InspectSettings, inspect, inspection_json
    from .inspect_summary import print_inspection, use_colour

    found = inspect(InspectSettings(folder=folder, **options))
    if as_json:
        click.echo(json.dumps(inspection_json(found, alternatives), ensure_ascii=True))
    else:
        print_inspection(found, alternatives, use_colour(color))
