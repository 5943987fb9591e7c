"""Prints what a run of score, build-targets, import or subset made, and the folder's sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...pipeline.folders.shard_run import REJECTS, StageResult, folder_in
from ...pipeline.folders.tasks import TaskResult
from ...pipeline.progress import log_event
from ...pipeline.targets.ceiling import ceilings
from ...pipeline.targets.translation import mapped_shares
from ..folders.lineage import described
from .ceiling_summary import mapped_rows, print_ceiling
from .tables import already, print_table


def report(out: Path, in_store: bool, result: StageResult | TaskResult, log: Path | None) -> None:
    """Print what a run did, and append it to a file of JSON lines if one is given."""
    if isinstance(result, TaskResult):
        print_part(result)
    else:
        identity = result.manifest.identity
        summary = print_scores if identity.stage == "score" else print_targets
        summary(folder_in(out, in_store, identity), result)
    _log_result(log, result)


def print_scores(folder: Path, result: StageResult) -> None:
    """Print a summary of a score folder."""
    totals = result.manifest.totals
    rejected = f"{totals['rejected']:,} rejected"
    if totals["rejected"]:
        rejected += f" (see {folder / REJECTS})"
    print_table(
        [
            ("scores", f"{folder}{already(result.was_done)}"),
            ("demonstrations", f"{totals['read']:,} read, {totals['rows']:,} scored, {rejected}"),
            ("", f"{totals['sums'].get('cut', 0):,.0f} of them cut to the limit"),
            *empty_answers(int(totals["sums"].get("empty_answers", 0))),
            ("supervised tokens", f"{totals['positions']:,}"),
            *_left_out(totals),
            ("kept mass", f"{result.manifest.kept_mass:.4f}"),
            ("mean loss", f"{totals['sums']['observed_nll'] / totals['positions']:.4f} nats"),
            *_size_and_speed(result),
        ]
    )


def empty_answers(count: int) -> list[tuple[str, str]]:
    """A row of the table for empty answers, if there are some."""
    return [("", f"{count:,} empty answers in them, not supervised")] if count else []


def print_targets(folder: Path, result: StageResult) -> None:
    """Print a summary of a target folder, and the best result that it allows."""
    settings, totals = result.manifest.settings, result.manifest.totals
    has_tail = settings["top_p"] is not None
    print_table(
        [
            ("targets", f"{folder}{already(result.was_done)}"),
            ("method", described(result.manifest.identity)),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("mean trust", f"{totals['sums']['trust'] / totals['positions']:.4f}"),
            ("mean support", f"{totals['entries'] / totals['positions']:.1f} entries"),
            *([("kept mass", f"{result.manifest.kept_mass:.4f}")] if has_tail else []),
            *_bounds(totals),
            *mapped_rows(mapped_shares(totals["sums"], totals["positions"])),
            *_size_and_speed(result),
        ]
    )
    print_ceiling(settings, ceilings(totals["sums"]), totals)


def print_subset(folder: Path, result: StageResult) -> None:
    """Print a summary of a subset."""
    totals = result.manifest.totals
    print_table(
        [
            ("subset", f"{folder}{already(result.was_done)}"),
            ("demonstrations", f"{totals['rows']:,}"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("bytes a token", f"{result.manifest.bytes_per_token:.1f}"),
        ]
    )


def print_part(result: TaskResult) -> None:
    """Print what one of several tasks did for a folder that is not finished."""
    rows = [
        ("folder", f"{result.folder}  (not finished: the last task to finish seals it)"),
        ("this task", f"{result.share}: {result.made:,} shards made"),
        ("shards", f"{result.there:,} of {result.shards:,} are there"),
    ]
    if result.seconds:
        speed = result.positions / result.seconds
        rows.append(("speed", f"{speed:,.0f} supervised tokens/s"))
    print_table(rows)


def _left_out(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row for the tokens of an import whose log-probability is not in the file."""
    number = totals["sums"].get("left_out")
    return [("", f"{number:,.0f} left out: not among the entries")] if number else []


def _bounds(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows for the largest possible error of tempered distributions."""
    return [
        (f"{name} bound", f"{totals['sums'][key] / totals['positions']:.2g} (total variation)")
        for name, key in (
            ("temperature", "temperature_bound"),
            ("teacher's", "teacher_temperature_bound"),
        )
        if key in totals["sums"]
    ]


def _size_and_speed(result: StageResult) -> list[tuple[str, str]]:
    rows = [("bytes a token", f"{result.manifest.bytes_per_token:.1f}")]
    if result.seconds:
        rows.append(("speed", f"{result.positions / result.seconds:,.0f} supervised tokens/s"))
    return rows


def _log_result(log: Path | None, result: StageResult | TaskResult) -> None:
    own = {"positions": result.positions, "seconds": result.seconds}
    if isinstance(result, TaskResult):
        counts = {"made": result.made, "there": result.there, "shards": result.shards}
        share = {"rank": result.share.rank, "world_size": result.share.world_size}
        log_event(log, "part", **own, **counts, **share)
        return
    manifest = result.manifest
    named = {"stage": manifest.identity.stage, "fingerprint": manifest.fingerprint}
    log_event(log, "done", **named, **own, totals=manifest.totals)
