"""A part of `make gpu`: a function that measures, run in a process of its own.

    python -m qpipe.tests.gpu.parts NAME WORK [--rehearse]

runs one part and adds its rows to WORK/NAME.jsonl as it finds them, so that a part that fails or is
stopped keeps what it has measured. A module of this folder that has parts names them in `PARTS`.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("rows", "scoring", "training")  # in the order of their parts


@dataclass(frozen=True, slots=True)
class Row:
    """A measured value; `unit` is empty where `value` is text."""

    what: str
    value: float | str
    unit: str = ""
    beside: str = ""  # what it means in comparison with another row


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a part runs."""

    work: Path  # models, data and outputs of all parts
    rehearse: bool  # small dimensions, to find mistakes without a GPU


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement; after `seconds` it is stopped."""

    about: str
    measure: Callable[[Bench], Iterator[Row]]
    seconds: int


def known_parts() -> dict[str, Part]:
    """The parts of all modules, by name."""
    found: dict[str, Part] = {}
    for name in MODULES:
        parts: Mapping[str, Part] = import_module(f"qpipe.tests.gpu.{name}").PARTS
        found |= parts
    return found


def rows_file(work: Path, name: str) -> Path:
    """Where a part's rows are."""
    return work / f"{name}.jsonl"


def read_rows(work: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a part, as JSON."""
    path = rows_file(work, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("work", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    part = known_parts()[given.name]
    with rows_file(given.work, given.name).open("w") as file:
        for row in part.measure(Bench(given.work, given.rehearse)):
            print(row, flush=True)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
