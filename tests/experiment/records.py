"""The records of judged runs: a file of JSON lines that only grows, and what is read off it."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plan import Run
from .task import Problem

Record = dict[str, Any]


@dataclass
class Records:
    """The records of a file, by the key of their run. Threads may add at the same time."""

    path: Path
    by_key: dict[str, Record] = field(default_factory=dict)
    _adding: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        lines = self._whole().splitlines()
        self.by_key = {(record := json.loads(line))["key"]: record for line in lines}

    def mend(self) -> None:
        """Cut off the line that a kill left unfinished; for the one process that adds."""
        if self.path.exists():
            os.truncate(self.path, len(self._whole()))

    def _whole(self) -> bytes:
        content = self.path.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def __contains__(self, run: Run) -> bool:
        return run.key in self.by_key

    def of(self, runs: Iterable[Run]) -> list[Record]:
        """The records of those runs that have one."""
        return [self.by_key[run.key] for run in runs if run in self]

    def add(self, record: Record) -> None:
        """Append a record; it survives whatever comes after."""
        with self._adding, open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_key[record["key"]] = record


def is_right(record: Record, problems: list[Problem]) -> NDArray[np.bool_]:
    """Which problems a record's answers solve, [I]."""
    pairs = zip(problems, record["answers"], strict=True)
    return np.array([problem.is_solved_by(answer) for problem, answer in pairs])


def best_learning_rate(searched: list[Record], problems: list[Problem]) -> float:
    """The learning rate with the most problems solved, of several the one with the lowest NLL."""
    best = max(searched, key=lambda each: (is_right(each, problems).sum(), -each["nll"]))
    return best["learning_rate"]
