"""What `make demo` reads of the commands that it runs."""

import runpy
from pathlib import Path

from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored
from qpipe.tests.support.folders import folder_of

ROOT = Path(__file__).parents[2]


def test_the_speeds_are_those_of_the_last_run_that_made_anything(tmp_path: Path) -> None:
    stage_speeds = runpy.run_path(str(ROOT / "data" / "demo.py"))["stage_speeds"]
    folder_of(tmp_path / "scores", [scored("a", [5, 6, 7], [{6: 0.5}, {7: 0.5}])])
    log = tmp_path / "log.jsonl"
    words = ("build-targets", "--scores", tmp_path / "scores", "--out", tmp_path / "targets")
    qpipe(*words, "--log-json", log)
    first = stage_speeds(log)
    assert list(first) == ["build-targets"]
    assert first["build-targets"] > 0
    qpipe(*words, "--log-json", log)  # done already
    assert stage_speeds(log) == first
