"""TensorBoard and wandb, which plot the numbers of a run, through accelerate's classes.

A tracker receives each event of log.jsonl when it is logged; `scalars` names its numbers. The
trackers are not registered with the `Accelerator`, which is created before the identity of the run.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import Identity
from ...pipeline.storage.json_files import sha256_of_json

Track = Callable[[int, dict[str, float]], None]  # gets a step and its values, by name
TRACKER_FOLDERS = ("tensorboard", "wandb")  # in the run's folder


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, as in {"evaluation/nll": 1.5}."""
    prefix = event["event"]
    fields = {name: value for name, value in event.items() if name not in ("event", "step")}
    numbers = fields | fields.pop("results", {})
    return {
        f"{prefix}/{name}": float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }


@contextmanager
def open_trackers(
    names: tuple[str, ...], folder: Path, step: int, identity: Identity
) -> Iterator[Track]:
    """A function that logs to all trackers; a resumed run continues after `step`.

    Raises UserError where one cannot be started.
    """
    with ExitStack() as stack:
        trackers = [
            stack.enter_context(_started(_tracker(name, folder, step, identity)))
            for name in dict.fromkeys(names)
        ]

        def track(number: int, values: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log(values, step=number)

        yield track


def _tracker(name: str, folder: Path, step: int, identity: Identity) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        if step == 0:  # what an earlier try of the run left behind
            shutil.rmtree(folder / name, ignore_errors=True)
        # steps after the checkpoint are logged again
        return TensorBoardTracker(name, folder, purge_step=step + 1 if step else None)
    place = str(folder.resolve())
    return WandBTracker(
        "qpipe",
        name=folder.resolve().name,
        dir=place,
        config=identity.settings,
        # a resumed run keeps its id; wandb ignores steps that it has
        id=sha256_of_json([place, identity.fingerprint])[:16],
        resume="allow",
    )


@contextmanager
def _started(tracker: Any) -> Iterator[Any]:
    """A started tracker, finished at the end; wandb marks the run as failed if the block raises."""
    try:
        tracker.start()
    except Exception as error:
        if tracker.name != "wandb":
            raise
        # no key, no network, ...
        raise UserError(
            f"--track {tracker.name}: cannot be started: {one_line(error)}: run `wandb login`, or "
            "set WANDB_MODE=offline"
        ) from error
    try:
        yield tracker
    except BaseException:
        if tracker.name == "wandb":
            tracker.tracker.finish(exit_code=1)
        else:
            tracker.finish()
        raise
    tracker.finish()
