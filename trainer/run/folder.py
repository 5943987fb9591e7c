"""The folder of a training run.

During the run it holds `plan.json`, as the folder of any stage does, and `log.jsonl`, which grows.
After it, it is a model folder. `qpipe.json`, written last, records what made the model, and the
results.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import PLAN, Identity, parse_identity, read_plan
from ...pipeline.folders.shard_run import refuse_other, tidy
from ...pipeline.format.records import Count
from ...pipeline.options import described
from ...pipeline.storage.files import TEMPORARY, read_lines, sha256_of_file, write_bytes
from ...pipeline.storage.json_files import read_json, refuse_misfits, sha256_of_json, write_json
from ...pipeline.threads import in_order
from ..settings import TrainSettings
from .trackers import TRACKER_FOLDERS, open_trackers, scalars

RUN = "qpipe.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
_SHORTEST_EVENT = 20  # bytes; others are not parsed, however many there are
_LONGEST_EVENT = 1 << 20  # bytes; parsed, small values take thirty times their text

Log = Callable[..., None]  # takes the fields of an event


class ModelFile(msgspec.Struct):
    """A file of a finished model."""

    bytes: Count
    sha256: str


class _Record(msgspec.Struct):
    """The fields of `qpipe.json` that are read again. qpipe 0.1 stored sizes alone, and no seal."""

    identity: dict[str, Any]
    files: dict[str, ModelFile | Count]
    results: dict[str, Any]
    seal: str | None = None


def run_identity(settings: TrainSettings, inputs: dict[str, str], **resolved: Any) -> Identity:
    """What determines the trained model; `resolved` replaces or completes the settings."""
    given: dict[str, Any] = {}
    for each, option in described(settings).items():
        if option.in_identity:
            value = getattr(settings, each.name)
            # 1 and 1.0 differ as JSON
            given[each.name] = float(value) if isinstance(each.default, float) else value
    return Identity(stage="train", settings=given | resolved, inputs=inputs, schema={})


def finished_run(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The record of the run in a folder, if it is finished.

    Raises UserError where the folder holds another run.
    """
    if not (folder / RUN).exists():
        return None
    found, record = read_record(folder)
    refuse_other(folder, identity, found)
    for path, (size, _) in model_files(folder, record).items():
        if _size(path) != size:
            raise UserError(
                f"{path}: missing or damaged, but listed in {RUN}: restore it, or remove {folder} "
                "and train again"
            )
    _tidy(folder)
    return record


def read_record(folder: Path) -> tuple[Identity, dict[str, Any]]:
    """The identity and the record of a finished run. Raises UserError if it is damaged."""
    path = folder / RUN
    record = read_json(path)
    with refuse_misfits(path, "record of a run", f"remove {folder}"):
        checked = msgspec.convert(record, _Record)
    if checked.seal not in (None, _seal(record)):
        raise UserError(
            f"{path}: damaged or changed, its seal does not match its identity and files: restore "
            f"it, or remove {folder}"
        )
    return parse_identity(path, checked.identity), record


def _seal(record: dict[str, Any]) -> str:
    """The hash of what determines and what makes up the model; not of the times that it took."""
    return sha256_of_json({name: record[name] for name in ("identity", "files")})


def model_files(folder: Path, record: dict[str, Any]) -> dict[Path, tuple[int, str | None]]:
    """The files of a finished model, each with its size and its hash, if it was recorded."""
    return {
        folder / name: (file, None) if isinstance(file, int) else (file["bytes"], file["sha256"])
        for name, file in record["files"].items()
    }


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of a run, finished or not; empty without record and plan."""
    if (folder / RUN).exists():
        return read_record(folder)[0].settings
    return read_plan(folder).identity.settings if (folder / PLAN).exists() else {}


def parse_event(line: bytes) -> dict[str, Any] | None:
    """An event of a log; None for a line without one, such as a truncated line."""
    if not _SHORTEST_EVENT <= len(line) <= _LONGEST_EVENT:
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and type(event.get("step")) is int
    return event if is_event and isinstance(event.get("event"), str) else None


def logged_events(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a log that hold an event, each with its event."""
    for line in read_lines(path, _LONGEST_EVENT + 1):
        event = parse_event(line)
        if event is not None:
            yield line, event


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Mark a run as finished; the record gets the model's files with sizes and hashes."""
    others = {PLAN, LOG, CHECKPOINTS, *TRACKER_FOLDERS}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    own = [path for path in paths if not fnmatch(path.parts[0], TEMPORARY)]
    names = sorted(str(path) for path in own if path.parts[0] not in others)
    hashes = in_order(lambda name: sha256_of_file(folder / name), names)
    files = {
        name: {"bytes": _size(folder / name), "sha256": sha256}
        for name, sha256 in zip(names, hashes, strict=True)
    }
    record = record | {"files": files}
    write_json(folder / RUN, record | {"seal": _seal(record)})
    _tidy(folder)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, by one rename first, so that no partial checkpoint remains."""
    aside = folder / f".{CHECKPOINTS}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        (folder / CHECKPOINTS).rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove the files that a finished run no longer needs, but a killed one resumes from."""
    remove_checkpoints(folder)
    tidy(folder)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextmanager
def open_log(
    folder: Path, is_main: bool, step: int, trackers: tuple[str, ...], identity: Identity
) -> Iterator[Log]:
    """A function that logs an event, as a line of JSON and to the trackers, on the main process.

    Lines that an earlier attempt of the run logged up to `step` stay.
    """
    if not is_main:
        yield lambda **event: None
        return
    kept = _logged_until(folder / LOG, step) if step else b""
    write_bytes(folder / LOG, kept)
    with (
        open_trackers(trackers, folder, step, identity) as track,
        open(folder / LOG, "ab", buffering=0) as file,
    ):

        def log(**event: Any) -> None:
            try:
                file.write(json.dumps(event).encode() + b"\n")
            except OSError as error:
                raise UserError(
                    f"{folder / LOG}: cannot be written: {error.strerror}: make room, then run the "
                    "same command again"
                ) from error
            track(event["step"], scalars(event))

        yield log


def _logged_until(path: Path, step: int) -> bytes:
    """The lines of a log up to a step."""
    logged = logged_events(path) if path.exists() else ()
    return b"".join(line.rstrip(b"\n") + b"\n" for line, event in logged if event["step"] <= step)
