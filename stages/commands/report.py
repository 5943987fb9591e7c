"""The words of `qpipe report`."""

from pathlib import Path
from typing import Any

import click

from .options import FILE_TO_WRITE, FOLDER, Command, Number, config_option, model_option


@click.command(cls=Command)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out",
    type=FILE_TO_WRITE,
    default=None,
    metavar="FILE",
    help="HTML file to write: needed, unless --png is given.",
)
@click.option(
    "--scores",
    type=FOLDER,
    default=None,
    metavar="DIR",
    help="The base's scores beside targets: shows the base, and what the target adds.",
)
@click.option(
    "--teacher", type=FOLDER, default=None, metavar="DIR", help="A teacher's scores beside them."
)
@model_option
@click.option(
    "--examples",
    type=click.IntRange(1),
    default=5000,
    help="Most demonstrations on the page; of more, a sample.",
)
@click.option(
    "--alternatives",
    type=click.IntRange(0, 8),
    default=5,
    metavar="K",
    help="Likeliest tokens of each distribution that the page knows at a position.",
)
@click.option(
    "--max-megabytes",
    type=Number(0.1),
    default=25.0,
    help="Of the file; where they do not fit, fewer demonstrations are shown.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the sample.")
@click.option(
    "--png",
    type=FILE_TO_WRITE,
    default=None,
    metavar="FILE",
    help="Of training runs: the curves as a picture, for papers.",
)
@config_option
def report(folders: tuple[Path, ...], **options: Any) -> None:
    """Make a page of what a folder holds: targets, scores, or training runs.

    One HTML file that loads nothing: open it in any browser, send it, keep it. Of targets or scores
    it shows the summary and the demonstrations, token by token; of one or several runs of `qpipe
    train`, their curves together.

    \b
    qpipe report targets/ --scores scores/ --out targets.html
    qpipe report run-a/ run-b/ --out training.html --png training.png
    """
    from ..report.make import make_report

    make_report(folders, **options)
