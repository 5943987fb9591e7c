"""A disk that fills up: a small file system, where this user may mount one."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.processes import FILLER
from qpipe.tests.support.tiers import slow
from qpipe.trainer.run.checkpoint import checkpoints_in

OPERATIONS = 1000
Resize = Callable[[int], None]


@pytest.fixture
def disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of 16 MB."""
    return mounted("size=16m")


def resize(disk: Path, size: int) -> None:
    """Give the file system so many bytes."""
    options = f"remount,size={size}"
    subprocess.run(["mount", "-o", options, str(disk)], check=True)


@pytest.mark.parametrize("step", [37, *slow(3)])
def test_full_from_any_operation_on(work: Work, disk: Path, step: int) -> None:
    ends = set()
    for number in range(step // 2 + 1, OPERATIONS, step):
        out = disk / str(number)
        command = work.strike(out, "fill", number)
        status = command.wait()
        ends.add(status)
        (disk / FILLER).unlink(missing_ok=True)
        if status == 0:
            work.judge(out)
            break
        assert_full(work, command.error, out)
        work.resume(out)
        shutil.rmtree(out)
    assert ends == {0, 2}


@pytest.mark.slow
def test_full_in_the_middle_of_a_file(work: Work, disk: Path) -> None:
    """With room for a part of the folder only."""
    parts = 25
    files = [path for path in work.undisturbed.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    fails = 0
    for part in range(parts):
        resize(disk, 4096 + size * part // parts)
        out = disk / str(part)
        command = work.start(out)
        work.count("other faults")
        if command.wait() != 0:
            fails += 1
            assert_full(work, command.error, out)
        resize(disk, 2**24)
        work.resume(out)
        shutil.rmtree(out)
    assert fails >= parts - 1


def assert_full(work: Work, error: str, out: Path) -> None:
    """It says what cannot be written and why, and leaves nothing half-made."""
    assert error.startswith(f"Error: {out}")
    assert "No space left on device" in error
    assert not list(out.rglob(".*.tmp"))
    if work.name == "train":
        for checkpoint in checkpoints_in(out):
            assert {"progress.json", "process-0.safetensors"} == {
                path.name for path in checkpoint.iterdir()
            }
