"""The files of a training run, spoilt: what reads them is right, or says so in a line."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from msgspec import to_builtins
from qpipe.pipeline.folders.manifest import Identity
from qpipe.stages.commands.status import print_status
from qpipe.stages.folders.status import status_of
from qpipe.stages.report.training_page import read_runs, training_head
from qpipe.trainer.run.folder import LOG, RUN, finished_run, open_log
from qpipe.trainer.run.loop import TrainResult, result_from

from .folders import as_bytes
from .inputs import Draw, damaged, fuzz, made_or_refused, spoilt

IDENTITY = Identity("train", {"method": "sft", "epochs": 1.0}, {"targets": "0123"}, {})
RESULT = TrainResult(4, 32, 36, 1.5, None, None)
EVENTS: list[Any] = [
    {"event": "evaluation", "step": 0, "nll": 2.5, "tokens": 40},
    *(
        {"event": "step", "step": step, "loss": 1.5, "tokens": 9, "tokens_per_second": 80.0}
        for step in range(1, 5)
    ),
]
VALUES: dict[str, Any] = {
    RUN: {"identity": to_builtins(IDENTITY), "results": asdict(RESULT), "files": {}},
    "plan.json": to_builtins(IDENTITY) | {"counts": {}},
}


def as_lines(events: list[Any]) -> bytes:
    return b"".join(as_bytes(each).replace(b"\n", b" ") + b"\n" for each in events)


@st.composite
def run_files(draw: Draw) -> dict[str, bytes]:
    """The files of a run, one of them spoilt."""
    files = {name: as_bytes(value) for name, value in VALUES.items()}
    files[LOG] = as_lines(EVENTS)
    if draw(st.booleans()):
        del files[RUN]  # not finished yet
    name = draw(st.sampled_from(list(files)))
    if draw(st.booleans()):
        files[name] = draw(damaged(files[name]))
    elif name == LOG:
        spoilt_events = draw(spoilt(EVENTS))
        files[name] = as_lines(spoilt_events if isinstance(spoilt_events, list) else [])
    else:
        files[name] = as_bytes(draw(spoilt(VALUES[name])))
    return files


def logged_until(folder: Path, step: int) -> list[bytes]:
    """What a run that goes on after a step keeps of the log."""
    with open_log(folder, True, step, (), IDENTITY):
        return (folder / LOG).read_bytes().splitlines()


def finished(folder: Path) -> TrainResult | None:
    record = finished_run(folder, IDENTITY)
    return None if record is None else result_from(folder, record["results"])


@fuzz(80, files=run_files())
def test_files_of_a_run_spoilt(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        readers: list[Callable[[], Any]] = [
            lambda: print_status(folder, status_of(folder)),
            lambda: json.loads(json.dumps(asdict(status_of(folder)))),
            lambda: training_head(read_runs([folder])),
            lambda: finished(folder),
            lambda: logged_until(folder, 2),
        ]
        for read in readers:
            made_or_refused(read)
