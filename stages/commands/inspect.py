"""`qpipe inspect`: options, call, output."""

import json
from pathlib import Path
from typing import Any

import click

from ..looking.settings import InspectSettings
from .options import FOLDER, Command, config_option, options_of, take


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@options_of(InspectSettings)
@click.option(
    "--alternatives",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Show the K most probable tokens at each supervised position.",
)
@click.option(
    "--color/--no-color",
    default=None,
    help="Colour the output.  [default: in a terminal, unless NO_COLOR is set]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_option
def inspect(
    folder: Path, alternatives: int, color: bool | None, as_json: bool, **options: Any
) -> None:
    """Show a summary of scores or targets, then examples token by token.

    Measures: trust, weight, target, base, gain (target - base), nll, entropy, rank, support,
    kept; also kl with --scores or --against, and tv (total variation) with --against. Tokens
    that are not supervised are dimmed.

    \b
    qpipe inspect targets/ --sort lowest-trust -n 5 --alternatives 3
    qpipe inspect targets/ --scores scores/ --sort largest-kl
    qpipe inspect gift/ --against dft/
    """
    from ..looking.inspect import inspect, inspection_json
    from .inspect_summary import print_inspection, use_colour

    found = inspect(take(InspectSettings, options, folder=folder))
    if as_json:
        click.echo(json.dumps(inspection_json(found, alternatives), ensure_ascii=True))
    else:
        print_inspection(found, alternatives, use_colour(color))
