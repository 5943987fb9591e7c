"""Clocks that jump: by ten years, forward and back, while a command works and between two."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.s3 import Bucket
from qpipe.tests.support.tiers import slow

TEN_YEARS = 3e8  # seconds
FAULTS = ("clock forward", "clock back")


@pytest.mark.parametrize("at", [6, *slow(0, 2, 15)])
@pytest.mark.parametrize("fault", [*slow(FAULTS[0]), FAULTS[1]])
def test_while_a_command_works(work: Work, tmp_path: Path, fault: str, at: int) -> None:
    command = work.strike(tmp_path / "out", fault, at)
    assert command.wait() == 0, command.said
    work.judge(tmp_path / "out")


@pytest.mark.parametrize("seconds", [TEN_YEARS, *slow(-TEN_YEARS)])
def test_files_of_another_time(work: Work, tmp_path: Path, seconds: float) -> None:
    """What a killed run left is from the future, or long past: that changes nothing."""
    out = tmp_path / "out"
    assert work.start(out, fault="kill", at=14).wait() == -signal.SIGKILL
    work.count("kills")
    for path in (out, *out.rglob("*")):
        os.utime(path, times=(time.time() + seconds, time.time() + seconds))
    said = work.status(out)
    assert "not finished, no command is running" in said
    assert not re.search(r"-\d", said.replace(str(out), ""))  # no time is less than none
    work.resume(out)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lease_in_a_bucket(
    works: Mapping[str, Work], s3: Bucket, tmp_path: Path, fault: str
) -> None:
    """A later clock sees a living lease as run out: two then write the same; an earlier waits."""
    reaching = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    work = replace(works["share"], name="share to s3", environment=reaching)
    first = work.start("s3://bucket/copy")
    while not s3.names("copy/.lease-"):
        assert first.is_running, first.said
    first.signal(signal.SIGSTOP)
    second = work.start("s3://bucket/copy", fault=fault)
    status = second.wait()
    work.count("other faults")
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.said
    if fault == "clock back":
        assert status == 2
        assert "another qpipe works in it" in second.error
    else:
        assert status == 0, second.said
    expected = {path.name: path.read_bytes() for path in work.undisturbed.iterdir()}
    found = s3.folder("copy")
    work.count("wrong", sum(found.get(name) != expected[name] for name in expected))
    work.count("left over", len(found.keys() - expected.keys()))
    assert found == expected


@contextmanager
def jumping(tmp_path: Path, words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command whose system clock, as all of its libraries see it, jumps again and again."""
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
    library = os.environ.get("LIBFAKETIME", library)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with subprocess.Popen(
        words, env=os.environ | fake | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        yield process


@pytest.mark.slow
def test_the_clock_of_the_system(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "qpipe.stages", *map(str, work.words), str(out)]
    with jumping(tmp_path, words) as process:
        jump = 0
        while process.poll() is None:
            time.sleep(0.02)
            jump += 1
            offset = ("+10y", "-10y", "+90s", "-1h", "+0")[jump % 5]
            shutil.copyfile(_said(tmp_path, offset), tmp_path / "clock")
            work.count("other faults")
        assert process.returncode == 0, process.communicate()[0]
    work.judge(out)


def _said(tmp_path: Path, offset: str) -> Path:
    path = tmp_path / "offset"
    path.write_text(offset)
    return path
