"""`qpipe subset`: options, call, output."""

from typing import Any

import click

from ..folders.settings import SubsetSettings
from .options import FILE, FOLDER, Command, config_option, options_of


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@options_of(SubsetSettings, ids={"type": FILE})
@config_option
def subset(**options: Any) -> None:
    """Select demonstrations of a score or target folder into a new folder.

    A condition compares a statistic of a demonstration with a number, with < <= > >= == or !=.
    Means are over supervised tokens; a condition on a mean is false if there are none.

    \b
    scores   tokens supervised_tokens mean_nll mean_tail_mass mean_weight
    targets  tokens supervised_tokens mean_trust mean_tail_mass mean_weight

    \b
    qpipe subset scores/ --out easy/ --where 'mean_nll < 2.5' 'tokens <= 1024'
    """
    from ..folders.subset import subset
    from .folder_summary import print_subset

    print_subset(options["out"], subset(SubsetSettings(**options)))
