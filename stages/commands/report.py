"""`qpipe report`: options, call, output."""

from pathlib import Path
from typing import Any

import click

from ..report.settings import ReportSettings
from .options import FILE_TO_WRITE, FOLDER, Command, config_option, options_of, take


@click.command(cls=Command)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out",
    type=FILE_TO_WRITE,
    default=None,
    metavar="FILE",
    help="HTML file to write. Required unless --png is given.",
)
@options_of(ReportSettings)
@click.option(
    "--png",
    type=FILE_TO_WRITE,
    default=None,
    metavar="FILE",
    help="Image file to write with the curves of training runs.",
)
@config_option
def report(folders: tuple[Path, ...], **options: Any) -> None:
    """Write an HTML page about targets, scores or training runs.

    The page is one file that loads nothing else. For targets or scores, it shows the summary
    and the demonstrations, token by token. For one or more runs of `qpipe train`, it shows
    their curves.

    \b
    qpipe report targets/ --scores scores/ --out targets.html
    qpipe report run-a/ run-b/ --out training.html --png training.png
    """
    from ..report.make import make_report

    out, png = options.pop("out"), options.pop("png")
    make_report(folders, take(ReportSettings, options, folder=folders[0]), out, png)
