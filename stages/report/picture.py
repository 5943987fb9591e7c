"""Draws the curves of training runs as a picture, for papers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError
from ...pipeline.storage.files import atomic_file
from .training_page import Chart, TrainingRun, charts, smoothed

_COLOURS = ("#2f5fd0", "#e08a1e", "#1f9a86", "#b53a7f", "#b8a11c", "#4a4f63")  # as on the page
_COLUMNS = 2


def write_picture(path: Path, runs: Sequence[TrainingRun]) -> None:
    """Write a PNG at 200 dots per inch, atomically.

    Raises UserError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install 'qpipe[report]'") from error
    drawn = charts(runs)
    rows = math.ceil(len(drawn) / _COLUMNS)
    figure: Any = Figure(figsize=(4.2 * _COLUMNS, 2.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for place, chart in enumerate(drawn):
        _draw(axes[place], chart)
    for empty in axes[len(drawn) :]:
        empty.axis("off")
    figure.legend(
        handles=[axes[0].plot([], [], color=_colour(run), lw=1.8)[0] for run in range(len(runs))],
        labels=[run.name for run in runs],
        loc="outside lower center",
        ncols=min(len(runs), 4),
        frameon=False,
        fontsize=9,
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=200)


def _draw(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    is_mixed = len({is_noisy for _, is_noisy, _ in chart.curves}) > 1
    dashes = "--" if is_mixed else "-"
    for run, is_noisy, points in chart.curves:
        steps, values = zip(*points, strict=True)
        if is_noisy:
            axes.plot(steps, values, color=_colour(run), lw=0.6, alpha=0.35)
            axes.plot(steps, [value for _, value in smoothed(points)], color=_colour(run), lw=1.5)
        else:
            marks = {"marker": "o", "ms": 3.5} if len(points) <= 60 else {}
            axes.plot(steps, values, color=_colour(run), lw=1.5, ls=dashes, **marks)
    axes.set_title(chart.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(chart.unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(run: int) -> str:
    return _COLOURS[run % len(_COLOURS)]
