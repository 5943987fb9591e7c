"""The parts of the module `trainer`, run in a process of its own, as parts of `make gpu`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from .parts import Bench, Part, Row

MODULE = "qpipe.tests.gpu.trainer"


def measured(bench: Bench, name: str) -> Iterator[Row]:
    """What the module finds in one of its parts, line by line."""
    out = bench.work / f"trainer-{name}"
    out.mkdir(exist_ok=True)
    kept = out / "trainer.jsonl"
    kept.unlink(missing_ok=True)
    words = [sys.executable, "-m", MODULE, name, *(["--rehearse"] if bench.rehearse else [])]
    running = subprocess.Popen(words, env=os.environ | {"OUT": f"{out}"})
    read, ended = 0, False
    while not ended:
        ended = running.poll() is not None
        lines = kept.read_text().splitlines()[read:] if kept.exists() else []
        read += len(lines)
        for line in lines:
            yield from rows_of(json.loads(line))
        time.sleep(0 if ended else 0.3)
    if running.returncode:
        raise RuntimeError(f"{MODULE} ended with status {running.returncode}")


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """A line as one row; the times of single steps are left to trainer.jsonl."""
    if found["part"] != "machine":
        values = {k: v for k, v in found.items() if k not in ("part", "name", "steps")}
        yield Row(
            found.get("name", found["part"]), ", ".join(f"{k} {v}" for k, v in values.items())
        )


def _part(name: str, about: str, seconds: int) -> Part:
    return Part(about, partial(measured, name=name), seconds)


PARTS = {
    "right": _part("right", "the loss and packed attention against truth", 90),
    "loss": _part("loss", "time and memory of the loss", 120),
    "products": _part("products", "the matrix products of the loss", 60),
    "step-0.6B": _part("step-0.6B", "training steps of a 0.6B model", 150),
    "step-1.7B": _part("step-1.7B", "training steps of a 1.7B model", 150),
    "trace": _part("trace", "the kernels of a training step", 60),
}
