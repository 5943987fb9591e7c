"""The words of `qpipe status`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from .options import FOLDER


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(folder: Path, as_json: bool) -> None:
    """Show the progress of a folder, also while a command writes it.

    Works for the folders of score, build-targets and train, from any terminal that can read
    them. Only reads, and does not block the command.

    \b
    qpipe status scores/
    """
    from ..folders.status import status_of
    from .status_summary import print_status

    found = status_of(folder)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        print_status(folder, found)
