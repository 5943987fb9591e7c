"""Chooses the page for the given folders and writes it."""

from collections.abc import Sequence
from pathlib import Path

import click

from ...pipeline.errors import UserError, escaped
from .folder_page import MEGABYTE, folder_page
from .page import page_html, write_page
from .settings import ReportSettings
from .training_page import is_run, read_runs, training_head


def make_report(
    folders: Sequence[Path], settings: ReportSettings, out: Path | None, png: Path | None
) -> None:
    """Write the page or the picture of some folders. Raises UserError for mixed kinds."""
    if out is None and png is None:
        raise UserError("no output: give --out FILE, as in --out report.html")
    are_runs = [is_run(folder) for folder in folders]
    if all(are_runs):
        _report_runs(folders, settings, out, png)
    elif any(are_runs) or len(folders) > 1:
        for folder in folders:
            if not folder.exists():
                raise UserError(f"{folder}: no such folder")
        raise UserError(
            f"{', '.join(map(str, folders))}: cannot be on one page: give one folder of targets or "
            "scores, or only training runs"
        )
    elif png is not None:
        raise UserError(f"--png {png}: requires training runs, {folders[0]} is not one")
    else:
        assert out is not None
        _report_folder(out, settings)


def _report_folder(out: Path, settings: ReportSettings) -> None:
    page = folder_page(settings)
    vocabulary, *chunks = page.chunks
    blobs = {"head": page.head, "vocabulary": vocabulary}
    blobs |= {f"chunk-{number}": chunk for number, chunk in enumerate(chunks)}
    size = write_page(out, page_html(page.title, ["folder.js"], blobs))
    for note in page.notes:
        click.echo(escaped(note))
    click.echo(f"{out}: {size / MEGABYTE:.1f} MB")


def _report_runs(
    folders: Sequence[Path], settings: ReportSettings, out: Path | None, png: Path | None
) -> None:
    for name in ("scores", "teacher", "model"):
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"--{name} {value}: does not apply to training runs: leave it out")
    runs = read_runs(folders)
    if out is not None:
        blobs = {"head": training_head(runs)}
        size = write_page(out, page_html(" · ".join(r.name for r in runs), ["training.js"], blobs))
        click.echo(f"{out}: {size / MEGABYTE:.1f} MB")
    if png is not None:
        from .picture import write_picture

        write_picture(png, runs)
        click.echo(str(png))
