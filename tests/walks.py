"""Counts the files that the settings of `qpipe score` and `qpipe train` pass through on their way.

    python -m qpipe.tests.walks [--json]

Both commands run over a tiny random model, on a CPU. The way starts where a function named as the
command is called with `settings`, and ends at the first call of the engine (score) or of the loss
(train). A file is on it if one of its functions is called with

- given: the settings, a value of one of their fields, or an object that holds either; or
- made: what a function called in such a way has returned, or a part of that.

Values are compared by identity. None, truth values, integers and empty values do not count.
"""

import json
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import qpipe
from qpipe.tests.conftest import make_tiny_model

ROOT = f"{Path(qpipe.__path__[0])}/"
ROOMS = tuple(ROOT + room for room in ("pipeline/", "trainer/", "stages/"))
DEPTH, WIDTH = 3, 8  # of objects in objects, and of the members looked at in a list


class Walk:
    """A profiler (`sys.setprofile`) that notes the files which the settings of a command reach."""

    def __init__(self, command: str, end: str, words: str) -> None:
        self.command, self.end, self.words = command, end, words
        self.made: dict[str, str] = {}  # by file, the first function; includes `given`
        self.given: dict[str, str] = {}
        self.settings: Any = None
        self.values: dict[int, Any] = {}  # by identity: of the settings' fields
        self.results: dict[int, Any] = {}  # what functions on the way have returned
        self.running: set[FrameType] = set()
        self.is_over = False

    def __call__(self, frame: FrameType, event: str, result: object) -> None:
        if event == "return" and frame in self.running:
            self.running.remove(frame)
            self.note_result(result)
        if event == "call" and not self.is_over and frame.f_code.co_filename.startswith(ROOMS):
            self.enter(frame)

    def enter(self, frame: FrameType) -> None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if self.settings is None and code.co_name == self.command and "settings" in names:
            self.settings = frame.f_locals["settings"]
            self.values = {id(each): each for each in members(self.settings) if counts(each)}
        self.is_over = self.settings is not None and code.co_qualname == self.end
        arguments = [frame.f_locals.get(name) for name in names]
        if self.settings is None or self.is_over:
            return
        for files, wanted in ((self.given, self.values), (self.made, self.values | self.results)):
            if self.reached(arguments, wanted):
                files.setdefault(code.co_filename.removeprefix(ROOT), code.co_qualname)
                self.running.add(frame)

    def reached(self, values: Iterable[Any], wanted: dict[int, Any], depth: int = DEPTH) -> bool:
        return any(
            isinstance(value, type(self.settings))
            or id(value) in wanted
            or (depth > 0 and self.reached(members(value), wanted, depth - 1))
            for value in values
        )

    def note_result(self, value: Any) -> None:
        if counts(value) and id(value) not in self.results:
            self.results[id(value)] = value
            for each in members(value):
                self.note_result(each)

    def run(self) -> None:
        from qpipe.stages.cli import main

        threading.setprofile(self)
        sys.setprofile(self)
        words = ["qpipe", self.command, *self.words.split()]
        with patch.object(sys, "argv", words), suppress(SystemExit):
            main()
        sys.setprofile(None)
        threading.setprofile(None)


def counts(value: Any) -> bool:
    is_empty = isinstance(value, (str, tuple)) and not value
    return not (is_empty or value is None or isinstance(value, int))


def members(value: Any) -> Iterable[Any]:
    """What a list, a partial call, or an object of the product holds."""
    if isinstance(value, (list, tuple)):
        return value[:WIDTH]
    if isinstance(value, partial):
        return [*value.args, *value.keywords.values()]
    if not type(value).__module__.startswith("qpipe."):
        return ()
    slots = [name for each in type(value).__mro__ for name in getattr(each, "__slots__", ())]
    own = [getattr(value, name, None) for name in slots if not name.startswith("__")]
    return own + list(getattr(value, "__dict__", {}).values())


def walks(out: Path) -> list[Walk]:
    """Follow the settings of score and train; what the commands write is in `out`."""
    model = make_tiny_model(out / "model", vocab_size=320)
    rows = [{"prompt": f"user {n} the", "completion": f" answer {n * 37}"} for n in range(9)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_score = f"--model {model} --demonstrations {out}/rows.jsonl --out {out}/scores"
    score = Walk("score", "TransformersScorer.score", f"{of_score} --engine transformers")
    build = Walk("build-targets", "", f"--scores {out}/scores --out {out}/targets")
    train = Walk("train", "fused_loss", f"--targets {out}/targets --model {model} --out {out}/run")
    for walk in (score, build, train):
        walk.run()
    return [score, train]


def main() -> None:
    """Print the files, or with `--json` one line of their counts."""
    with tempfile.TemporaryDirectory() as made:
        found = walks(Path(made))
    if "--json" in sys.argv:
        counts = [{"given": len(walk.given), "made": len(walk.made)} for walk in found]
        print("\n" + json.dumps(counts), flush=True)
        return
    for walk in found:
        print(f"\n{walk.command}: {len(walk.given)} given, {len(walk.made)} given or made")
        for file, function in walk.made.items():
            print("given" if file in walk.given else "made ", file, function)


if __name__ == "__main__":
    main()
