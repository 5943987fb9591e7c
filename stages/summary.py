"""What the commands say when they are done, as a few aligned lines, and as JSON for machines."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..pipeline.errors import UserError
from ..pipeline.manifest import Manifest
from ..pipeline.runner import REJECTS, StageResult

if TYPE_CHECKING:
    from ..trainer.loop import TrainResult


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def print_scores(folder: Path, result: StageResult) -> None:
    """What a score folder holds."""
    totals = result.manifest.totals
    rejected = f"{totals['rejected']:,} rejected"
    if totals["rejected"]:
        rejected += f" (see {folder / REJECTS})"
    print_table(
        [
            ("scores", f"{folder}{_already(result)}"),
            ("demonstrations", f"{totals['read']:,} read, {totals['rows']:,} scored, {rejected}"),
            ("", f"{totals['sums'].get('cut', 0):,.0f} of them cut to the limit"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("kept mass", f"{kept_mass(result.manifest):.4f}"),
            ("mean loss", f"{totals['sums']['observed_nll'] / totals['positions']:.4f} nats"),
            *_size_and_speed(result),
        ]
    )


def print_targets(folder: Path, result: StageResult) -> None:
    """What a target folder holds."""
    settings, totals = result.manifest.settings, result.manifest.totals
    has_tail = settings["residual"] == "base"
    parameters = "".join(f", {name}={value:g}" for name, value in settings["parameters"].items())
    print_table(
        [
            ("targets", f"{folder}{_already(result)}"),
            ("method", f"{settings['method']} ({settings['form']}{parameters})"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("mean trust", f"{totals['sums']['trust'] / totals['positions']:.4f}"),
            ("mean support", f"{totals['entries'] / totals['positions']:.1f} entries"),
            *([("kept mass", f"{kept_mass(result.manifest):.4f}")] if has_tail else []),
            *_size_and_speed(result),
        ]
    )


def print_training(folder: Path, result: "TrainResult") -> None:
    """How a training run went."""
    already = "  (was there already, nothing to do)" if result.was_done else ""
    speed = result.tokens / max(result.seconds, 1e-9)
    rows = [
        ("model", f"{folder}{already}"),
        ("steps", f"{result.steps:,} over {result.examples:,} demonstrations"),
        ("supervised tokens", f"{result.tokens:,}"),
        ("speed", f"{speed:,.0f} supervised tokens/s"),
    ]
    for when, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            words = f"target loss {evaluation.target_loss:.4f}, NLL {evaluation.nll:.4f}"
            if evaluation.kl_to_base is not None:
                words += f", KL to base {evaluation.kl_to_base:z.4f}"
            rows.append((f"held out, {when}", words))
    print_table(rows)


def kept_mass(manifest: Manifest) -> float:
    """The mean probability that the stored entries hold."""
    return 1 - manifest.totals["sums"]["tail_mass"] / manifest.totals["positions"]


def bytes_per_token(manifest: Manifest) -> float:
    """Bytes of the shards for each supervised token."""
    return manifest.totals["bytes"] / manifest.totals["positions"]


def log_result(path: Path, result: StageResult) -> None:
    """Append what a run did to a file of JSON lines."""
    event: dict[str, Any] = {
        "time": time.time(),
        "event": "done",
        "stage": result.manifest.identity.stage,
        "fingerprint": result.manifest.fingerprint,
        "positions": result.positions,
        "seconds": result.seconds,
        "totals": result.manifest.totals,
    }
    try:
        with open(path, "a") as file:
            file.write(json.dumps(event) + "\n")
    except OSError as error:
        raise UserError(f"--log-json {path}: cannot be written: {error.strerror}") from error


def _already(result: StageResult) -> str:
    return "" if not result.was_done else "  (was there already, nothing to do)"


def _size_and_speed(result: StageResult) -> list[tuple[str, str]]:
    rows = [("bytes a token", f"{bytes_per_token(result.manifest):.1f}")]
    if result.seconds:
        rows.append(("speed", f"{result.positions / result.seconds:,.0f} supervised tokens/s"))
    return rows
