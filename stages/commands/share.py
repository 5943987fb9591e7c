"""`qpipe share`, `qpipe list` and `qpipe lineage`: options, call, output."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from .options import FOLDER, Command


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("target", metavar="URL", type=FOLDER)
@click.option(
    "--license",
    "license_id",
    default=None,
    help="License identifier for the card, for example mit.",
)
@click.option("--title", default=None, help="Title of the card.  [default: the name of the folder]")
def share(folder: Path, target: Path, license_id: str | None, title: str | None) -> None:
    """Copy a finished folder to a path or URL, as a dataset with a card.

    URL is a path or an fsspec URL (s3://, gs://, hf://datasets/…, file://). Shards are verified
    by their hashes, and the manifest is copied last. Run again to copy what is missing.

    \b
    qpipe share targets/ s3://bucket/targets
    qpipe share targets/ hf://datasets/name/targets --license cc-by-4.0
    """
    from ..folders.share import share

    result = share(folder, target, license_id, title)
    totals = result.manifest.totals
    done = "was there already" if result.was_done else f"{result.copied:,} shard(s) copied"
    click.echo(
        f"{target}: {done}: {totals['rows']:,} demonstrations, {totals['bytes']:,} bytes, "
        f"fingerprint {result.manifest.fingerprint[:12]}"
    )


@click.command("list", cls=Command)
@click.argument("root", metavar="ROOT", type=FOLDER)
@click.option(
    "--stage",
    type=click.Choice(("score", "build-targets", "mix")),
    default=None,
    help="Show only folders of this stage.",
)
@click.option(
    "--contains", default=None, metavar="TEXT", help="Show only lines that contain this text."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per folder.")
def list_(root: Path, stage: str | None, contains: str | None, as_json: bool) -> None:
    """List the folders under a path or URL, one per line."""
    from ..folders.listing import Listed, catalogue
    from .tables import print_table

    def cells(each: Listed) -> tuple[str, ...]:
        if each.error is not None:
            return (each.folder, "damaged", *[""] * 6, each.error)
        size = "" if each.bytes_per_token is None else f"{each.bytes_per_token:.1f}"
        return (
            each.folder,
            each.stage if each.is_sealed else f"{each.stage}, not finished",
            each.model or "",
            each.made,
            "" if each.rows is None else f"{each.rows:,}",
            "" if each.positions is None else f"{each.positions:,}",
            size,
            " ".join(parent[:12] for parent in each.parents),
            _words(each.age),
        )

    found = [each for each in catalogue(root) if stage is None or each.stage == stage]
    shown = [each for each in found if contains is None or contains in " ".join(cells(each))]
    if as_json:
        for each in shown:
            click.echo(json.dumps(asdict(each), ensure_ascii=True))
        return
    head = ("folder", "stage", "model", "made", "demos", "tokens", "B/token", "from", "age")
    print_table([head, *map(cells, shown)])


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
def lineage(folder: Path) -> None:
    """Show the inputs of a folder, back to the demonstrations."""
    from ...pipeline.errors import escaped_line
    from ...pipeline.folders.manifest import read_manifest
    from ..folders.lineage import generations

    for depth, words in generations(read_manifest(folder)):
        click.echo(f"{'  ' * depth}{escaped_line(words)}")


def _words(seconds: float | None) -> str:
    """A time span in its largest unit."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
