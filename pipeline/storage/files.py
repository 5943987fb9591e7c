"""Atomic writes, reads of bounded size, and hashes."""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from .remote import is_remote, remote_file

TEMPORARY = ".*.tmp"  # names of unfinished files; a killed run may leave some
MOST_BYTES = 2**28  # of a JSON file: enough for half a million scored shards, or 2 million rejects


@contextmanager
def atomic_file(path: Path, create: bool = False) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only if the block ends without an error.

    A local file is written under a temporary name, synced and renamed; a remote file is uploaded
    as a whole. After an error `path` is unchanged. With `create` a present file stays, and
    FileExistsError is raised.
    """
    if is_remote(path):
        with remote_file(path, create) as file:
            yield file
        return
    # random, so that writers on different machines do not share it
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, path) if create else os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not (create and isinstance(error, FileExistsError)):
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Rename a file, unless there is one of the new name: raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(path, "xb") as file:
            try:
                file.write(temporary.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink()
                raise
    temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that its file names survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be synced: {error.strerror}: see to the disk, then run the same "
            "command again"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def create_bytes(path: Path, content: bytes) -> bool:
    """Write a file atomically unless it exists; returns whether it did not."""
    try:
        with atomic_file(path, create=True) as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def read_bytes(path: Path) -> bytes:
    """Read a file that this package wrote. Raises UserError if it is larger than those."""
    with _own_file(path):
        return path.read_bytes()


def read_lines(path: Path, longest: int) -> Iterator[bytes]:
    """The lines of such a file, one in memory at a time; one above `longest` comes in pieces."""
    with _own_file(path), path.open("rb") as file:
        yield from iter(partial(file.readline, longest), b"")


@contextmanager
def _own_file(path: Path) -> Iterator[None]:
    """Refuse a file that is larger than this package writes, or that cannot be read."""
    try:
        size = _size_of_regular(path)
        if size > MOST_BYTES:
            raise UserError(f"{path}: damaged, it has {size:,} bytes, more than qpipe writes")
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def refuse_irregular(path: Path) -> None:
    """Raise UserError for a local pipe, device or folder: reading it might never end."""
    if not is_remote(path):
        _size_of_regular(path)


def _size_of_regular(path: Path) -> int:
    status = path.stat()  # one call: a request for a remote file
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: cannot be read: not a file")
    return status.st_size


def is_content(path: Path, content: bytes) -> bool:
    """Whether a file holds exactly this content; reads it only if the size is right."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content. Raises UserError if it is not a file."""
    refuse_irregular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingFile:
    """A file to write that keeps the hash and size of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Only mark it as closed: the block that opened the file still syncs it."""
        self.closed = True
