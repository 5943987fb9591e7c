"""The data of the page of training runs: curves from log.jsonl, and differing settings."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError, escaped
from ...pipeline.storage.json_files import is_number
from ...trainer.run.folder import LOG, RUN, logged_events, settings_in
from .folder_page import json_text

MOST_CURVES = 1000  # of a run
MOST_VALUES = 5_000_000  # of a run; each takes 120 bytes
MOST_POINTS = 1000  # of a curve; more points are averaged
_OF_STEPS = ("loss", "tokens_per_second", "grad_norm", "learning_rate", "error_bound")
_EVALUATIONS = ("evaluation", "eval_command")
_NO_CURVE = {"step", "tokens", "time"}
_TITLES = {
    "loss": "Loss",
    "target_loss": "Held-out loss",
    "nll": "Held-out NLL",
    "kl_to_base": "Held-out KL to the base",
    "tokens_per_second": "Supervised tokens a second",
    "grad_norm": "Norm of the gradient",
    "learning_rate": "Learning rate",
    "error_bound": "Bound of the truncation's effect",
}
_UNITS = {"loss": "nats", "target_loss": "nats", "nll": "nats", "kl_to_base": "nats"}
_FIRST = ("nll", "kl_to_base", "tokens_per_second")

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training run: its settings, and its curves (steps and values) by event and field."""

    name: str
    path: Path
    settings: dict[str, Any]
    curves: dict[tuple[str, str], Points]
    tokens: int  # supervised, over the logged steps
    is_finished: bool

    @property
    def steps(self) -> int:
        """The last logged step."""
        return int(max((points[-1][0] for points in self.curves.values() if points), default=0))


def is_run(folder: Path) -> bool:
    """Whether a folder was made by `qpipe train`."""
    return (folder / LOG).exists() or (folder / RUN).exists()


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """The runs in these folders, finished or not, with unique names."""
    names = [folder.resolve().name for folder in folders]
    return [
        _read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read_run(folder: Path, name: str) -> TrainingRun:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / LOG).exists():
        raise UserError(f"{folder}: has no {LOG}: give a folder made by `qpipe train`")
    curves: dict[tuple[str, str], Points] = {}
    tokens = values = 0
    for event in _events(folder / LOG):
        kind, step = event["event"], event["step"]
        tokens += event["tokens"] if kind == "step" and is_number(event.get("tokens")) else 0
        own = event.get("results") if kind == "eval_command" else event
        for field, value in own.items() if isinstance(own, dict) else ():
            if is_number(value) and _is_wanted(kind, field):
                curves.setdefault((kind, field), []).append((step, value))
                values += 1
        if len(curves) > MOST_CURVES or values > MOST_VALUES:
            most = f"{MOST_VALUES:,}" if values > MOST_VALUES else f"{MOST_CURVES:,} kinds of"
            raise UserError(
                f"{folder / LOG}: holds more than {most} values, more than a page can show"
            )
    settings = settings_in(folder)
    return TrainingRun(name, folder, settings, curves, tokens, (folder / RUN).exists())


def _events(path: Path) -> Iterator[dict[str, Any]]:
    events = (event for _, event in logged_events(path))
    first = next(events, None)
    if first is None:
        raise UserError(f"{path}: nothing is logged yet: wait for the first step")
    return chain([first], events)


def _is_wanted(event: str, field: str) -> bool:
    if event == "evaluation":
        return field not in _NO_CURVE
    return event == "eval_command" or (event == "step" and field in _OF_STEPS)


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves of one kind: of each run, the points and whether they are noisy."""

    title: str
    unit: str
    curves: list[tuple[int, bool, Points]]


def charts(runs: Sequence[TrainingRun]) -> list[Chart]:
    """The charts of some runs: losses first, then all other logged values."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    loss = [("step", "loss"), ("evaluation", "target_loss")]
    rest = [key for key in keys if key not in loss]
    rest.sort(key=lambda key: _FIRST.index(key[1]) if key[1] in _FIRST else len(_FIRST))
    groups = [("loss", loss), *((field, [(event, field)]) for event, field in rest)]
    made = []
    for field, group in groups:
        curves = [
            (place, event == "step" and name != "learning_rate", thinned(run.curves[event, name]))
            for event, name in group
            for place, run in enumerate(runs)
            if run.curves.get((event, name))
        ]
        if curves:
            made.append(_chart(group[0][0], field, curves))
    return made


def _chart(event: str, field: str, curves: list[tuple[int, bool, Points]]) -> Chart:
    if event == "eval_command":  # a name from the user's command
        return Chart(escaped(field), "", curves)
    title = _TITLES.get(field) or f"Held-out {field.replace('_', ' ')}"
    return Chart(title, _UNITS.get(field, ""), curves)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """A curve of at most `most` points, each the mean of neighbouring ones."""
    width = math.ceil(len(points) / most)
    if width <= 1:
        return points
    groups = (points[start : start + width] for start in range(0, len(points), width))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def smoothed(points: Points) -> Points:
    """A running mean over a thirtieth of the curve."""
    reach = max(1, len(points) // 60)
    found = []
    for place, (step, _) in enumerate(points):
        around = points[max(0, place - reach) : place + reach + 1]
        found.append((step, sum(value for _, value in around) / len(around)))
    return found


def training_head(runs: Sequence[TrainingRun]) -> str:
    """The data of the page as compressed JSON."""
    return json_text(
        {
            "kind": "training",
            "runs": [_run_json(run, settings) for run, settings in _differing(runs)],
            "charts": [
                {
                    "title": chart.title,
                    "unit": chart.unit,
                    "curves": [_curve_json(*curve) for curve in chart.curves],
                }
                for chart in charts(runs)
            ],
        }
    )


def _curve_json(run: int, is_noisy: bool, points: Points) -> dict[str, Any]:
    rounded = [[step, float(f"{value:.5g}")] for step, value in points]
    course = [[step, float(f"{value:.5g}")] for step, value in smoothed(points)]
    return {
        "run": run,
        "noisy": is_noisy,
        "points": rounded,
        "course": course if is_noisy else rounded,
    }


def _run_json(run: TrainingRun, settings: dict[str, Any]) -> dict[str, Any]:
    last = {
        _column(run, event, field): points[-1][1]
        for (event, field), points in run.curves.items()
        if event in _EVALUATIONS and points
    }
    speeds = [value for _, value in run.curves.get(("step", "tokens_per_second"), [])]
    return {
        "name": escaped(run.name),
        "path": escaped(str(run.path)),
        "settings": {name: escaped(str(value)) for name, value in settings.items()},
        "steps": run.steps,
        "tokens": run.tokens,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "last": last,
        "finished": run.is_finished,
    }


def _column(run: TrainingRun, event: str, field: str) -> str:
    """The column of a value in the table; a name of --eval-command that is taken gets a suffix."""
    is_taken = event == "eval_command" and ("evaluation", field) in run.curves
    return escaped(field) + (" of --eval-command" if is_taken else "")


def _differing(runs: Sequence[TrainingRun]) -> list[tuple[TrainingRun, dict[str, Any]]]:
    """The runs with the settings in which they differ; a selection of settings for one run."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if len(runs) == 1:
        wanted = ["method", "learning_rate", "batch_size", "epochs", "seed"]
    else:
        wanted = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    return [
        (run, {name: run.settings[name] for name in wanted if name in run.settings}) for run in runs
    ]
