"""`qpipe mix`: options, call, output."""

from pathlib import Path

import click

from .options import FOLDER, Command
from .tables import already


@click.command(cls=Command)
@click.argument("parts", metavar="DIR=WEIGHT...", nargs=-1, required=True)
@click.option("--out", required=True, type=FOLDER, help="Output folder.")
def mix(parts: tuple[str, ...], out: Path) -> None:
    """Mix target folders by weight, without copying them.

    The new folder stores the path or URL, the fingerprint and the sampling share of each part.
    Reading it fails if a part has changed or is missing. All parts must have the same tokenizer
    and vocabulary, and targets that one training run can use.

    \b
    qpipe mix code/=3 chat/=1 --out mixed/
    """
    from ...pipeline.folders.mixing import read_mix, write_mix

    result = write_mix(out, [_part(part) for part in parts])
    made = read_mix(out)
    total = sum(part.weight for part in made)
    click.echo(f"{out}{already(result.was_done)}")
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
