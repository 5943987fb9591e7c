"""`qpipe status`: the progress of a folder, read without a lock while a command writes it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import (
    MANIFEST,
    PLAN,
    Plan,
    ShardEntry,
    read_manifest,
    read_plan,
    totals_of,
)
from ...pipeline.folders.shard_run import sidecar_indices
from ...pipeline.folders.shards import read_sidecar, sidecar_path
from ...pipeline.storage.files import refuse_irregular
from ...pipeline.storage.json_files import is_number
from ...pipeline.storage.locks import is_worked_in
from ...trainer.run.folder import LOG, RUN, parse_event

_RECENT = 300.0  # seconds before the last shard over which speed is averaged
_LOG_TAIL = 2**16  # bytes, many times a line of a training log


@dataclass(frozen=True, slots=True)
class FolderStatus:
    """The progress of a folder of shards; None is unknown.

    `is_worked_in` covers processes on this machine and, for a remote folder, on all; work on other
    machines shows in `seconds_since_shard`.
    """

    stage: str
    is_done: bool
    is_worked_in: bool | None
    shards: int
    shards_in_all: int | None
    demonstrations: int  # read, rejected ones included
    demonstrations_in_all: int | None
    rejected: int
    tokens: int
    positions: int
    bytes: int
    seconds_since_shard: float | None = None
    positions_per_second: float | None = None  # over the last five minutes of work
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class TrainStatus:
    """The progress of a training run by the last step in its log; None is unknown."""

    stage: str
    is_done: bool
    is_worked_in: bool | None
    step: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_since_step: float | None


def status_of(folder: Path) -> FolderStatus | TrainStatus:
    """The progress of a folder. Raises UserError if no stage made it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / LOG).exists() or (folder / RUN).exists():
        return _train_status(folder)
    if not (folder / MANIFEST).exists() and (folder / PLAN).exists():
        try:
            return _unfinished(folder)
        except UserError:
            if not (folder / MANIFEST).exists():  # or it was sealed just now
                raise
    return _sealed(folder)


def _sealed(folder: Path) -> FolderStatus:
    manifest = read_manifest(folder)
    plan = Plan(manifest.identity, len(manifest.shards), manifest.totals["read"])
    return _counted(folder, plan, manifest.shards, is_done=True)


def _unfinished(folder: Path) -> FolderStatus:
    plan = read_plan(folder)
    if "subset" in plan.identity.settings:  # the plan has the number of the source
        plan = msgspec.structs.replace(plan, demonstrations=None)
    indices = sidecar_indices(folder)
    entries = [read_sidecar(folder, index)[0] for index in indices]
    status = _counted(folder, plan, entries, is_done=False)
    times = [sidecar_path(folder, index).stat().st_mtime for index in indices]
    if not times or not all(times):  # no shard yet, or a store without modification times
        return status
    last = max(times)
    status = replace(status, seconds_since_shard=max(0.0, time.time() - last))
    first = min(each for each in times if each >= last - _RECENT)
    made = [entry for each, entry in zip(times, entries, strict=True) if each > first]
    if not made:
        return status
    seconds = last - first
    left = None
    if plan.shards is not None and status.is_worked_in is not False:
        left = (plan.shards - len(entries)) * seconds / len(made)
    speed = sum(entry.positions for entry in made) / seconds
    return replace(status, positions_per_second=speed, seconds_left=left)


def _counted(
    folder: Path, plan: Plan, entries: Sequence[ShardEntry], is_done: bool
) -> FolderStatus:
    """The status of a folder with these shards, without times."""
    totals = totals_of(list(entries))
    return FolderStatus(
        stage=plan.identity.stage,
        is_done=is_done,
        is_worked_in=is_worked_in(folder),
        shards=len(entries),
        shards_in_all=plan.shards,
        demonstrations=totals["read"],
        demonstrations_in_all=plan.demonstrations,
        rejected=totals["rejected"],
        tokens=totals["tokens"],
        positions=totals["positions"],
        bytes=totals["bytes"],
    )


def _train_status(folder: Path) -> TrainStatus:
    step = _last_step(folder / LOG)
    is_done = (folder / RUN).exists()
    is_under_way = step and not is_done
    since = max(0.0, time.time() - (folder / LOG).stat().st_mtime) if is_under_way else None
    return TrainStatus(
        stage="train",
        is_done=is_done,
        is_worked_in=is_worked_in(folder),
        step=step.get("step"),
        loss=_number(step, "loss"),
        tokens_per_second=_number(step, "tokens_per_second"),
        seconds_since_step=since,
    )


def _last_step(log: Path) -> dict[str, Any]:
    """The last step in a training log; empty if there is none yet."""
    if not log.exists():
        return {}
    refuse_irregular(log)
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        lines = file.read().splitlines()
    events = map(parse_event, reversed(lines))  # the first and last line may be incomplete
    return next((event for event in events if event and event["event"] == "step"), {})


def _number(event: dict[str, Any], name: str) -> float | None:
    value = event.get(name)
    return value if is_number(value) else None
