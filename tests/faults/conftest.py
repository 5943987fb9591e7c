"""The four commands, small, each with what it makes undisturbed; and the counts at the end."""

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.tests.faults.work import COUNTS, TALLY, Work
from qpipe.tests.support.tiers import slow

STAGES = ("score", "build-targets", "share", "train")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the options given, where this user may."""
    folder = tmp_path / "mounted"

    def mount(options: str) -> Path:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def works(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Work]:
    """The commands by their names; 47 demonstrations in six shards, two of them rejected."""
    root = tmp_path_factory.mktemp("undisturbed")
    file = root / "chats.jsonl"
    rows: list[object] = [
        {"prompt": f"Say {n}.", "completion": f"The answer is {n}. " * (1 + n % 5)}
        for n in range(45)
    ]
    rows[20:20] = [{"text": "no known form"}, {"prompt": "What?", "completion": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, targets = root / "score", root / "build-targets"
    words = {
        "score": ("score", "--model", tiny_model, "--demonstrations", file, "--engine",
                  "transformers", "--top-k", 8, "--shard-size", 8, "--out"),
        "build-targets": ("build-targets", "--scores", scores, "--out"),
        "share": ("share", targets),
        "train": ("train", "--targets", targets, "--model", tiny_model, "--batch-size", 8,
                  "--epochs", 4, "--save-every", 5, "--learning-rate", 1e-3, "--eval-fraction",
                  0.2, "--eval-every", 7, "--out"),
    }  # fmt: skip
    return {name: undisturbed(Work(name, words[name], root / name)) for name in STAGES}


def undisturbed(work: Work) -> Work:
    """The work, done twice without a fault, and how long that takes the second time."""
    again = work.undisturbed.with_name(f"{work.name}-again")
    seconds = 0.0
    for out in (work.undisturbed, again):
        start = time.monotonic()
        command = work.start(out)
        assert command.wait() == 0, command.said
        seconds = time.monotonic() - start
    work.judge(again)
    return replace(work, seconds=seconds)


# what building and sharing do under faults, scoring does as well
@pytest.fixture(params=["score", "train", *slow("build-targets", "share")])
def work(request: pytest.FixtureRequest, works: dict[str, Work]) -> Work:
    """One command after the other."""
    return works[request.param]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts of all faults: the last four must be zero."""
    if not TALLY:
        return
    terminalreporter.section("faults")
    rows = [*TALLY.items(), ("all", sum(TALLY.values(), Counter()))]
    for first, *others in (("", *COUNTS), *((name, *map(row.get, COUNTS)) for name, row in rows)):
        cells = "".join(f"{each or 0:>14}" for each in others)
        terminalreporter.write_line(f"{first:15}{cells}")
