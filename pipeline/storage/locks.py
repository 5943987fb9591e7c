"""Folder locks: exclusive for one command, shared among the tasks of one job.

Locks end with the process. They work on one machine, and between machines if their shared file
system supports locks; without lock support they have no effect.

A process that works in a remote folder writes a lease there, an object that it renews. The lease of
a killed process expires; on the same machine it has no effect. Single shards are not locked there,
so a lease also excludes a second start of the same task. Two processes that start at the same
moment may miss each other's leases; they write the same bytes.
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

PATIENCE = 10.0  # seconds to wait while another task opens the folder
LEASE = 120.0  # seconds until a lease expires that is not renewed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for one command; creates a missing one.

    Raises UserError if another process works in it.
    """
    with lock_of(folder) as lock:
        if not lock.alone():
            raise _busy(folder)
        yield


def lock_of(folder: Path) -> "FolderLock | Lease":
    """The lock of a folder: a lease if it is remote."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file: --out needs a folder")
    return Lease(folder) if is_remote(folder) else FolderLock(folder)


class FolderLock:
    """The lock of a local folder, which it creates if it is missing."""

    def __init__(self, folder: Path) -> None:
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
        """Lock the folder exclusively, if no other process works in it. May lose a held share."""
        return _try(self._descriptor, fcntl.LOCK_EX)

    def share(self, task: str) -> None:
        """Lock the folder as one of the tasks that share it.

        Raises UserError if another process keeps it locked exclusively.
        """
        del task  # two processes with the same task exclude each other shard by shard: `claimed`
        deadline = time.monotonic() + PATIENCE
        while not _try(self._descriptor, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise _busy(self._folder)
            time.sleep(0.05)


class Lease:
    """The lock of a remote folder: an object for each process that works there."""

    def __init__(self, folder: Path) -> None:
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
            with suppress(UserError):  # if the store cannot be reached, the lease expires
                self._path.unlink(missing_ok=True)

    def alone(self) -> bool:
        """As `FolderLock.alone`."""
        if any(self._others()):
            return False
        self._take("alone")
        return True

    def share(self, task: str) -> None:
        """As `FolderLock.share`; raises UserError also if another process has the same task.

        Waits first, until the lease of a killed process would expire.
        """
        if self._kind == "share":
            return
        self._task = task
        if self._kind == "alone":  # without a check: two that started at once would both wait
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
            with suppress(UserError):  # the present lease is valid for some time
                self._write()


def _leases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and contents of the valid leases in a remote folder."""
    for path in folder.glob(".lease-*.tmp"):
        try:
            lease = json.loads(path.read_bytes())
            is_held = lease["kind"] in ("alone", "share") and lease["until"] > time.time()
            if is_held and not (lease["host"] == _host() and _has_ended(lease["pid"])):
                yield path.name, lease
        except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
            continue  # just removed, or not a lease of qpipe


def locks_work(folder: Path) -> bool:
    """Whether a lock on a folder holds other processes off, as far as this machine can tell.

    Some file systems, NFS among them, refuse or ignore locks of folders.
    """
    if is_remote(folder):
        return False
    first, second = (os.open(folder, os.O_RDONLY) for _ in range(2))
    try:
        return not (_try(first, fcntl.LOCK_EX) and _try(second, fcntl.LOCK_EX))
    finally:
        os.close(first)
        os.close(second)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock a file to be made by this process; yields False if another process makes it.

    Has no effect in a remote folder: processes that make the same file write the same bytes.
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
    except OSError:  # a file system without lock support
        pass
    return True


def _host() -> str:
    """The name of this machine and process namespace."""
    return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        pass
    return False


def _busy(folder: Path) -> UserError:
    until = f" (the lease of a killed one expires after {LEASE:.0f} s)" if is_remote(folder) else ""
    return UserError(
        f"{folder}: another qpipe works in it: wait for it{until}, or give another --out"
    )


def is_worked_in(folder: Path) -> bool | None:
    """Whether a process has locked a folder; does not touch the locks.

    Covers this machine for a local folder, all machines for a remote one; None if unknown.
    """
    if is_remote(folder):
        return any(_leases(folder))
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        inode = str(folder.stat().st_ino)
    except OSError:
        return None
    words = [line.split() for line in lines if "->" not in line]  # such a process waits
    return any(each[1] == "FLOCK" and each[5].rpartition(":")[2] == inode for each in words)
