"""The words of `qpipe subset`."""

from typing import Any

import click

from .options import FILE, FOLDER, Command, config_option


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder to make.")
@click.option(
    "--ids",
    type=FILE,
    default=None,
    metavar="FILE",
    help="Take the demonstrations of these ids, one a line.",
)
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION...",
    help="Take those of which this holds, as in 'mean_nll < 2.5'; of several, all of them.",
)
@config_option
def subset(**options: Any) -> None:
    """Take some demonstrations of a folder of scores or targets, as a folder of the same kind.

    A condition compares a statistic of a demonstration with a number, by < <= > >= == or !=. A mean
    is one over its supervised tokens; no condition on it holds where there are none.

    \b
    scores   tokens supervised_tokens mean_nll mean_tail_mass mean_weight
    targets  tokens supervised_tokens mean_trust mean_tail_mass mean_weight

    \b
    qpipe subset scores/ --out easy/ --where 'mean_nll < 2.5' 'tokens <= 1024'
    """
    from ..folders.subset import SubsetSettings, subset
    from .folder_summary import print_subset

    print_subset(options["out"], subset(SubsetSettings(**options)))
