"""`qpipe status`: options, call, output."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import FOLDER
from .tables import print_table

if TYPE_CHECKING:
    from ..folders.status import FolderStatus, TrainStatus


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

    found = status_of(folder)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        print_status(folder, found)


def print_status(folder: Path, status: "FolderStatus | TrainStatus") -> None:
    """Print the progress of a folder."""
    from ..folders.status import FolderStatus

    work = {True: "in progress", False: "not finished, no command is running", None: "not finished"}
    state = "done" if status.is_done else work[status.is_worked_in]
    rows = [(status.stage, f"{folder}  ({state})")]
    rows += _shard_rows(status) if isinstance(status, FolderStatus) else _step_rows(status)
    print_table(rows)


def _shard_rows(status: "FolderStatus") -> list[tuple[str, str]]:
    rows = [
        ("shards", _of(status.shards, status.shards_in_all)),
        ("demonstrations", _of(status.demonstrations, status.demonstrations_in_all)),
        ("rejected", f"{status.rejected:,}"),
        ("supervised tokens", f"{status.positions:,} of {status.tokens:,} tokens"),
        ("bytes", f"{status.bytes:,}"),
    ]
    if status.positions_per_second is not None:
        rows.append(("speed", f"{status.positions_per_second:,.0f} supervised tokens/s"))
    if status.seconds_since_shard is not None:
        rows.append(("last shard", f"{_time(status.seconds_since_shard)} ago"))
    if status.seconds_left is not None:
        rows.append(("time left", f"about {_time(status.seconds_left)}"))
    return rows


def _step_rows(status: "TrainStatus") -> list[tuple[str, str]]:
    if status.step is None:
        return [("steps", "none yet")]
    rows = [
        ("step", f"{status.step:,}"),
        ("loss", "-" if status.loss is None else f"{status.loss:.4f}"),
    ]
    if status.tokens_per_second is not None:
        rows.append(("speed", f"{status.tokens_per_second:,.0f} supervised tokens/s"))
    if status.seconds_since_step is not None:
        rows.append(("last step", f"{_time(status.seconds_since_step)} ago"))
    return rows


def _of(count: int, total: int | None) -> str:
    return f"{count:,}" if not total else f"{count:,} of {total:,} ({count / total:.1%})"


def _time(seconds: float) -> str:
    from tqdm import tqdm

    return tqdm.format_interval(seconds)
