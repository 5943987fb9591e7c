"""The folder of a training run.

Under work it holds `plan.json`, as any stage's folder does, and a growing `log.jsonl`. A finished
run is a model folder with `qpipe.json`, written last, which says what made the model and how it
went.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..pipeline.errors import UserError
from ..pipeline.manifest import PLAN, Identity, parse_identity
from ..pipeline.runner import refuse_other
from ..pipeline.storage import read_json, write_json
from .mixture import shares_of
from .settings import TrainSettings
from .trackers import TRACKER_FOLDERS, open_trackers, scalars

RUN = "qpipe.json"
LOG = "log.jsonl"

Log = Callable[..., None]  # takes the fields of an event

_PLACES = {"targets", "model", "revision", "out"}  # known by their content instead
# these leave every gradient as it is
_CUT = {"forward_tokens", "pack", "gradient_checkpointing", "fsdp"}
_SAVING = {"save_every", "keep_checkpoints", "resume"}
_SHOWING = {"track", "eval_command"}
_CHECKS = {"verify"}


def run_identity(settings: TrainSettings, inputs: dict[str, str], **resolved: Any) -> Identity:
    """What determines the trained model; `resolved` holds what the settings leave open."""
    given = asdict(settings)
    for field in fields(settings):
        if field.name in _PLACES | _CUT | _SAVING | _SHOWING | _CHECKS:
            del given[field.name]
        elif isinstance(field.default, float):
            given[field.name] = float(given[field.name])  # 1 and 1.0 differ as JSON
    weights = settings.mixture_weights
    given["mixture_weights"] = list(shares_of(weights)) if weights else None  # 6,2 is 3,1
    return Identity(stage="train", settings=given | resolved, inputs=inputs, schema={})


def finished_run(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The record of the run that a folder holds, if it is finished.

    Raises UserError where that is another run.
    """
    path = folder / RUN
    if not path.exists():
        return None
    record = read_json(path)
    try:
        found, files = parse_identity(path, record["identity"]), dict(record["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, no record of a run: remove {folder}") from error
    refuse_other(folder, identity, found)
    lost = [name for name, size in files.items() if _size(folder / name) != size]
    if lost:
        raise UserError(
            f"{folder / lost[0]}: missing or damaged, {RUN} names it: restore it, or remove "
            f"{folder} and train again"
        )
    (folder / PLAN).unlink(missing_ok=True)
    return record


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Declare a run finished; the record gets the names and sizes of the model's files."""
    others = (PLAN, LOG, *TRACKER_FOLDERS)
    names = sorted(path.name for path in folder.iterdir() if path.name not in others)
    write_json(folder / RUN, record | {"files": {name: _size(folder / name) for name in names}})
    (folder / PLAN).unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextmanager
def open_log(
    folder: Path, is_main: bool, step: int, trackers: tuple[str, ...], identity: Identity
) -> Iterator[Log]:
    """A function that logs an event as one line of JSON, and tells the trackers.

    What an earlier try of the run logged until `step` stays. Silent but on the main process.
    """
    if not is_main:
        yield lambda **event: None
        return
    kept = _logged_until(folder / LOG, step) if step else ""
    with (
        open_trackers(trackers, folder, step, identity) as track,
        open(folder / LOG, "wb", buffering=0) as file,
    ):

        def write(text: str) -> None:
            try:
                file.write(text.encode())
            except OSError as error:
                raise UserError(
                    f"{folder / LOG}: cannot be written: {error.strerror}: make room, then run the "
                    "same command again"
                ) from error

        def log(**event: Any) -> None:
            write(json.dumps(event) + "\n")
            track(event["step"], scalars(event))

        write(kept)
        yield log


def _logged_until(path: Path, step: int) -> str:
    """The lines of a log until a step; a last one that was cut short is none."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            break
        if event["step"] <= step:
            kept.append(line + "\n")
    return "".join(kept)
