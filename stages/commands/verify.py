"""The words of `qpipe verify`."""

from pathlib import Path

import click

from ..options import FOLDER, Command

_MOST_SHOWN = 20


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
def verify(folder: Path) -> None:
    """Check a folder of scores or targets, every byte and every value.

    Compares the hash of every file with the manifest, reads every row, and checks columns, counts,
    ids, probabilities, masses and positions, and the fingerprints back to the demonstrations. Names
    the shard, row and column of what is wrong; exit status 2 if anything is.
    """
    from ...pipeline.errors import UserError
    from ...pipeline.manifest import read_manifest
    from ..verify import verify

    found = 0
    for problem in verify(folder):
        found += 1
        if found <= _MOST_SHOWN:
            click.echo(problem, err=True)
    if found:
        raise UserError(f"{folder}: {found} problem(s): restore it, or make it again")
    manifest = read_manifest(folder)
    totals = manifest.totals
    click.echo(
        f"{folder}: all well: {totals['rows']:,} demonstrations, {totals['positions']:,} "
        f"supervised tokens, {len(manifest.shards):,} shard(s)"
    )
