"""The words of `qpipe mix`."""

from pathlib import Path

import click

from .options import FOLDER, Command


@click.command(cls=Command)
@click.argument("parts", metavar="DIR=WEIGHT...", nargs=-1, required=True)
@click.option("--out", required=True, type=FOLDER, help="Folder to make.")
def mix(parts: tuple[str, ...], out: Path) -> None:
    """Mix folders of targets by weights, without copying them.

    The folder names its parts, paths or URLs, their fingerprints and their shares of the samples;
    it is refused where one of them has changed or is gone. Parts must be targets for the same
    tokenizer and vocabulary that a training run can follow together.

    \b
    qpipe mix code/=3 chat/=1 --out mixed/
    """
    from ...pipeline.folders.mixing import read_mix, write_mix

    result = write_mix(out, [_part(part) for part in parts])
    made = read_mix(out)
    total = sum(part.weight for part in made)
    click.echo(f"{out}{'  (was there already, nothing to do)' if result.was_done else ''}")
    for part in made:
        totals = part.folder.manifest.totals
        click.echo(
            f"  {part.weight / total:6.1%}  {part.folder.path}: {totals['rows']:,} demonstrations, "
            f"{totals['positions']:,} supervised tokens"
        )


def _part(text: str) -> tuple[Path, float]:
    from ...pipeline.storage.remote import open_path

    folder, equals, weight = text.rpartition("=")
    try:
        share = float(weight if equals and folder else "no")
    except ValueError as error:
        raise click.UsageError(f"{text}: give a folder and its weight, as in targets/=3") from error
    return open_path(folder), share
