"""What the commands say when they are done, as a few aligned lines, and as JSON for machines."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..pipeline.ceiling import Ceiling, ceiling_advice, ceilings, reproducible_share
from ..pipeline.errors import UserError
from ..pipeline.manifest import Manifest
from ..pipeline.methods import table
from ..pipeline.runner import REJECTS, StageResult

if TYPE_CHECKING:
    from ..trainer.loop import TrainResult
    from .compare_methods import Comparison


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
            *_left_out(totals),
            ("kept mass", f"{kept_mass(result.manifest):.4f}"),
            ("mean loss", f"{totals['sums']['observed_nll'] / totals['positions']:.4f} nats"),
            *_size_and_speed(result),
        ]
    )


def _left_out(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tokens of an import whose log-probability was not in the file."""
    number = totals["sums"].get("left_out")
    return [("", f"{number:,.0f} left out: not among the entries")] if number else []


def print_targets(folder: Path, result: StageResult) -> None:
    """What a target folder holds, and what it can teach."""
    settings, totals = result.manifest.settings, result.manifest.totals
    has_tail = settings["top_p"] is not None
    parameters = "".join(
        f", {name}={value:.6g}" if isinstance(value, float) else f", {name}={value}"
        for name, value in settings["parameters"].items()
    )
    print_table(
        [
            ("targets", f"{folder}{_already(result)}"),
            ("method", f"{settings['method']} ({settings['form']}{parameters})"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("mean trust", f"{totals['sums']['trust'] / totals['positions']:.4f}"),
            ("mean support", f"{totals['entries'] / totals['positions']:.1f} entries"),
            *([("kept mass", f"{kept_mass(result.manifest):.4f}")] if has_tail else []),
            *_bounds(totals),
            *_size_and_speed(result),
        ]
    )
    print_ceiling(settings["form"], ceilings(totals["sums"]), totals)


def print_subset(folder: Path, result: StageResult) -> None:
    """What a subset holds."""
    totals = result.manifest.totals
    print_table(
        [
            ("subset", f"{folder}{_already(result)}"),
            ("demonstrations", f"{totals['rows']:,}"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("bytes a token", f"{bytes_per_token(result.manifest):.1f}"),
        ]
    )


def print_ceiling(form: str, rows: list[Ceiling], totals: Mapping[str, Any]) -> None:
    """What targets can teach at best, by the base's probability of the token."""
    if not rows:
        return
    at = " (at the start, where the student is the base)" if form == "live" else ""
    click.echo(f"\nWhat these targets can teach at best{at}")
    head = ("b(y)", "tokens", "-log Q(y)", "Q's mode is y", "γ < 0.05", "KL from base")
    print_table([head, *(_ceiling_cells(row) for row in rows)])
    share = reproducible_share(totals["sums"], totals["rows"])
    click.echo(f"Demonstrations that greedy decoding of Q writes: {share:.1%}")
    advice = ceiling_advice(rows[0], share)
    if advice:
        click.echo(f"Warning: {advice}", err=True)


def print_comparison(comparison: "Comparison") -> None:
    """The ceiling of every method."""
    head = ("method", "form", "-log Q(y)", "Q's mode is y", "demos", "γ < 0.05", "KL from base")
    rows = [
        (
            choice.method.name,
            choice.form,
            f"{row.nll:.4f}",
            f"{row.learnable:.1%}",
            f"{share:.1%}",
            f"{row.starved:.1%}",
            f"{row.divergence:.4f}",
        )
        for choice, row, share in comparison.rows
    ]
    print_table([head, *rows])
    click.echo(
        f"\n{comparison.positions:,} supervised tokens of {comparison.examples:,} demonstrations. "
        "demos: how many greedy decoding of Q writes.\nA live form is shown as it starts, where "
        "the student is the base. Q(y) below 1e-10 counts as 1e-10."
    )
    for reason, names in comparison.left_out.items():
        click.echo(f"Left out, {reason}: {', '.join(names)}.")


def print_methods() -> None:
    """The table of methods, a few lines each."""
    for row in table():
        residual, scale = row["residual"], row["scale"]
        click.echo(f"{row['name']}  ({row['source']})")
        target = f"γ = {row['trust']}" + (f"   π̃ {residual}" if residual != "-" else "")
        click.echo(f"    {target}" + (f"   s = {scale}" if scale != "1" else ""))
        for name in ("parameters", "forms", "needs"):
            if row[name] != "-":
                click.echo(f"    {name}: {row[name]}")


def _ceiling_cells(row: Ceiling) -> tuple[str, ...]:
    if not row.positions:
        return (row.name, "0", "", "", "", "")
    return (
        row.name,
        f"{row.positions:,}",
        f"{row.nll:.4f}",
        f"{row.learnable:.1%}",
        f"{row.starved:.1%}",
        f"{row.divergence:.4f}",
    )


def _bounds(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far off a temperature's distribution may be."""
    return [
        (f"{name} bound", f"{totals['sums'][key] / totals['positions']:.2g} (total variation)")
        for name, key in (
            ("temperature", "temperature_bound"),
            ("teacher's", "teacher_temperature_bound"),
        )
        if key in totals["sums"]
    ]


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
