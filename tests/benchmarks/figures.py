"""What the benchmarks have in common: ways that take turns, and figures that `make bench` gathers.

A figure is a ratio inside one run on one machine: how many times as fast, or as small, as what it
stands beside. Where the environment names a file in QPIPE_FIGURES, figures are added to it.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from qpipe.stages.commands.tables import print_table


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured ratio; `low` and `high` are the extremes over the turns."""

    what: str
    ours: str
    beside: str  # what it is compared with, and that one's own figure
    ratio: float
    low: float
    high: float


def publish(figures: Sequence[Figure]) -> None:
    """Print figures as a table, and add them to the file that gathers them."""
    rows = [("", "qpipe", "beside it", "ratio", "spread")]
    rows += [(f.what, f.ours, f.beside, f"{f.ratio:.2f}", spread(f)) for f in figures]
    print_table(rows)
    gathered = os.environ.get("QPIPE_FIGURES")
    if gathered:
        with open(gathered, "a") as file:
            file.writelines(json.dumps(asdict(figure)) + "\n" for figure in figures)


def spread(figure: Figure) -> str:
    """The extremes of a ratio."""
    return f"{figure.low:.2f} to {figure.high:.2f}"


def faster(
    what: str, ours: Sequence[float], beside: str, theirs: Sequence[float], amount: float, unit: str
) -> Figure:
    """How many times as fast ours was, of seconds of as many turns, each for `amount` of `unit`."""
    ratios = [slow / quick for quick, slow in zip(ours, theirs, strict=True)]
    own, other = (f"{amount / median(each):,.0f} {unit}/s" for each in (ours, theirs))
    return Figure(what, own, f"{beside}: {other}", median(ratios), min(ratios), max(ratios))


def take_turns(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way in each run, after one run that warms up; every other one backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for run in range(runs):
        for name in ways if run % 2 == 0 else reversed(ways):
            seconds[name].append(timed(ways[name]))
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
