"""Folders that cannot be written, or no longer."""

from collections.abc import Callable
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.tiers import slow

OPERATIONS = 1000


@pytest.fixture
def read_only(mounted: Callable[[str], Path]) -> Path:
    """A folder that is mounted read-only."""
    return mounted("ro,size=1m")


def test_a_read_only_folder(work: Work, read_only: Path) -> None:
    for out in (read_only, read_only / "new"):
        command = work.start(out)
        assert command.wait() == 2, command.said
        assert command.error.startswith(f"Error: {out}")
        assert command.error.endswith("Read-only file system")
        work.count("other faults")


def test_a_folder_of_somebody_else(work: Work, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    out = tmp_path / "new"
    command = work.start(out, has_privileges=False)
    assert command.wait() == 2, command.said
    assert command.error == f"Error: {out}: cannot be used for output: Permission denied"
    work.count("other faults")
    tmp_path.chmod(0o755)
    work.resume(out)


@pytest.mark.parametrize("step", [37, *slow(3)])
def test_a_permission_lost_at_any_operation(work: Work, tmp_path: Path, step: int) -> None:
    """The shards and checkpoints until then stay, and the run goes on once it is given back."""
    ends = set()
    for number in range(step // 2 + 1, OPERATIONS, step):
        out = tmp_path / str(number)
        command = work.strike(out, "forbid", number, has_privileges=False)
        status = command.wait()
        ends.add(status)
        if status == 0:
            work.judge(out)
            break
        assert status == 2, command.said
        assert str(out) in command.error
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        work.resume(out)
    assert ends == {0, 2}
