"""Files that appear whole or not at all, read with a bound and hashed."""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .remote import is_remote, remote_file

TEMPORARY = ".*.tmp"  # names of files under work; a killed run may leave some
MOST_BYTES = 2**28  # of a JSON file: that of half a million scored shards, or two million rejects


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends well.

    A local one is written beside `path` under a temporary name, synced, then renamed; a remote one
    is put there as a whole. Whatever goes wrong in between leaves `path` as it was.
    """
    if is_remote(path):
        with remote_file(path) as file:
            yield file
        return
    # no two writers share it, whatever machines they are on
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def read_bytes(path: Path) -> bytes:
    """The content of a file that this package wrote, which is never huge."""
    try:
        status = path.stat()  # once: for a remote file that is a request
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: cannot be read: not a file")
        if status.st_size > MOST_BYTES:
            size = status.st_size
            raise UserError(f"{path}: damaged, no such file of ours has {size:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def is_content(path: Path, content: bytes) -> bool:
    """Whether a file holds just this; reads no more than that."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
