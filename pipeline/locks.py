"""Who may work in a folder: one command alone, or the tasks of one job together.

The locks end with the process, however that ends. They hold on this machine, and between machines
where their shared file system passes locks on; on a file system without locks they hold nobody off.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

_PATIENCE = 10.0  # seconds for the task that is opening the folder just now


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, against everybody else.

    Raises UserError where somebody works in it.
    """
    with FolderLock(folder) as lock:
        if not lock.alone():
            raise _busy(folder)
        yield


class FolderLock:
    """A lock on a folder, which is made where it is missing: alone, or with other tasks."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file: --out needs a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{folder}: cannot be used for output: {error.strerror}") from error
        self._folder = folder

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def alone(self) -> bool:
        """Hold the folder alone, if nobody else works in it; a share that was held may be lost."""
        return _try(self._descriptor, fcntl.LOCK_EX)

    def share(self) -> None:
        """Hold the folder together with others that share it.

        Raises UserError where a command works in it alone, and goes on to.
        """
        deadline = time.monotonic() + _PATIENCE
        while not _try(self._descriptor, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise _busy(self._folder)
            time.sleep(0.05)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a file that is to be made against other tasks; False where one of them makes it."""
    claim = path.with_name(f".{path.name}.claim.tmp")
    try:
        descriptor = os.open(claim, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        is_ours = _try(descriptor, fcntl.LOCK_EX)
        yield is_ours
        if is_ours:
            claim.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _busy(folder: Path) -> UserError:
    return UserError(f"{folder}: another qpipe works in it: wait for it, or give another --out")


def is_worked_in(folder: Path) -> bool | None:
    """Whether a process of this machine holds a folder, told without touching its locks.

    None where the machine does not tell.
    """
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        inode = str(folder.stat().st_ino)
    except OSError:
        return None
    words = [line.split() for line in lines if "->" not in line]  # that is one who waits
    return any(each[1] == "FLOCK" and each[5].rpartition(":")[2] == inode for each in words)
