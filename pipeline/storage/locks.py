"""Who may work in a folder: one command alone, or the tasks of one job together.

The locks end with the process, however that ends. They hold on this machine, and between machines
where their shared file system passes locks on; on a file system without locks they hold nobody off.
In a remote folder whoever works there leaves a lease, an object that is renewed as long as the
process lives; one of a killed process runs out, and on the same machine holds nobody off. As there
are no locks on single shards there, it also holds off the same task when that is started twice. Two
that come within the same moment may not see each other: they write the same.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from .remote import is_remote, remote_file

PATIENCE = 10.0  # seconds for the task that is opening the folder just now
LEASE = 120.0  # seconds that a remote folder stays held after its holder was last heard of


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, against everybody else.

    Raises UserError where somebody works in it.
    """
    with lock_of(folder) as lock:
        if not lock.alone():
            raise _busy(folder)
        yield


def lock_of(folder: Path) -> "FolderLock | Lease":
    """The lock on a folder that suits where it lies."""
    return Lease(folder) if is_remote(folder) else FolderLock(folder)


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

    def share(self, task: str) -> None:
        """Hold the folder, as one of the tasks that share it.

        Raises UserError where a command works in it alone, and goes on to.
        """
        del task  # that another process does it too is seen shard by shard: `claimed`
        deadline = time.monotonic() + PATIENCE
        while not _try(self._descriptor, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise _busy(self._folder)
            time.sleep(0.05)


class Lease:
    """A lock on a remote folder: one object for each process that works there."""

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            raise UserError(f"{folder}: is a file: --out needs a folder")
        self._folder = folder
        self._path = folder / f".lease-{secrets.token_hex(6)}.tmp"
        self._kind = self._task = ""
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        if self._kind:
            self._ended.set()
            self._renewing.join()
            with suppress(UserError):  # out of reach: it runs out by itself
                self._path.unlink(missing_ok=True)

    def alone(self) -> bool:
        """As `FolderLock.alone`."""
        if any(self._others()):
            return False
        self._take("alone")
        return True

    def share(self, task: str) -> None:
        """As `FolderLock.share`, and a UserError also where the same task is at work.

        Waits first, until a killed one would be forgotten.
        """
        if self._kind == "share":
            return
        self._task = task
        if self._kind == "alone":  # nobody can refuse it, or two that came at once would each wait
            self._kind = "share"
            self._write()
            return
        deadline = time.monotonic() + LEASE + PATIENCE
        while any(each["kind"] == "alone" or each.get("task") == task for each in self._others()):
            if time.monotonic() > deadline:
                raise _busy(self._folder)
            time.sleep(1)
        self._take("share")

    def _others(self) -> Iterator[dict[str, Any]]:
        return (lease for name, lease in _leases(self._folder) if name != self._path.name)

    def _take(self, kind: str) -> None:
        before, self._kind = self._kind, kind
        try:
            self._write()
        except UserError:
            self._kind = before
            raise
        if not before:
            self._renewing.start()

    def _write(self) -> None:
        lease = {"kind": self._kind, "until": time.time() + LEASE}
        lease |= {"host": _host(), "pid": os.getpid(), "task": self._task}
        with remote_file(self._path) as file:
            file.write(json.dumps(lease).encode())

    def _renew(self) -> None:
        while not self._ended.wait(LEASE / 4):
            with suppress(UserError):  # it still holds for a while
                self._write()


def _leases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and contents of the leases in a remote folder that hold."""
    for path in folder.glob(".lease-*.tmp"):
        try:
            lease = json.loads(path.read_bytes())
            is_held = lease["kind"] in ("alone", "share") and lease["until"] > time.time()
            if is_held and not (lease["host"] == _host() and _has_ended(lease["pid"])):
                yield path.name, lease
        except FileNotFoundError:  # given up just now
            continue
        except (ValueError, TypeError, KeyError, OverflowError):  # no lease of ours
            continue


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a file that is to be made against other tasks; False where one of them makes it.

    In a remote folder nobody is held off: two that make the same file write the same.
    """
    if is_remote(path):
        yield True
        return
    claim = path.with_name(f".{path.name}.claim.tmp")
    try:
        descriptor = os.open(claim, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        is_ours = _try(descriptor, fcntl.LOCK_EX)
        try:
            yield is_ours
        finally:
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


def _host() -> str:
    """This machine, as far as processes see each other."""
    return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _busy(folder: Path) -> UserError:
    until = f" (a killed one is forgotten after {LEASE:.0f} s)" if is_remote(folder) else ""
    return UserError(
        f"{folder}: another qpipe works in it: wait for it{until}, or give another --out"
    )


def is_worked_in(folder: Path) -> bool | None:
    """Whether a process of this machine holds a folder, told without touching its locks.

    Of a remote folder: whether a process anywhere does. None where the machine does not tell.
    """
    if is_remote(folder):
        return any(_leases(folder))
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        inode = str(folder.stat().st_ino)
    except OSError:
        return None
    words = [line.split() for line in lines if "->" not in line]  # that is one who waits
    return any(each[1] == "FLOCK" and each[5].rpartition(":")[2] == inode for each in words)
