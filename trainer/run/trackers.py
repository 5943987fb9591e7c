"""Where a run's numbers are shown as they come: TensorBoard and wandb.

A tracker gets what is in log.jsonl, line by line: `scalars` makes names of a line's fields.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import Identity
from ...pipeline.storage.json_files import sha256_of_json

Track = Callable[[int, dict[str, float]], None]  # takes a step and its values, by name
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
    """A function that tells all trackers; a run goes on after `step` where it was cut off.

    Raises UserError where one cannot be started.
    """
    with ExitStack() as stack:
        tracks = [
            stack.enter_context(_OPEN[name](folder, step, identity))
            for name in dict.fromkeys(names)
        ]

        def track(number: int, values: dict[str, float]) -> None:
            for each in tracks:
                each(number, values)

        yield track


@contextmanager
def _tensorboard(folder: Path, step: int, _: Identity) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    events = folder / "tensorboard"
    if step == 0:  # an earlier try's, of which nothing is left
        shutil.rmtree(events, ignore_errors=True)
    # what an earlier try showed after the checkpoint will be shown again
    with SummaryWriter(str(events), purge_step=step + 1 if step else None) as writer:

        def track(number: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, number)

        yield track


@contextmanager
def _wandb(folder: Path, _: int, identity: Identity) -> Iterator[Track]:
    import wandb  # pyright: ignore[reportMissingImports]

    place = str(folder.resolve())
    try:
        run = wandb.init(
            project="qpipe",
            name=folder.resolve().name,
            dir=place,
            config=identity.settings,
            # a run that goes on is the same run; what it logs a second time is what it logged
            id=sha256_of_json([place, identity.fingerprint])[:16],
            resume="allow",
        )
    except Exception as error:  # no key, no network, ...
        raise UserError(
            f"--track wandb: cannot be started: {one_line(error)}: run `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from error
    try:
        yield lambda number, values: run.log(values, step=number)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb}
