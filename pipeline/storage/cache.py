"""Local copies of remote files, under a limit: shards by their content, others by their version."""

import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import sha256_of_file
from .remote import fetch, is_remote, version_of

FOLDER, SIZE = "QPIPE_CACHE", "QPIPE_CACHE_GB"  # environment variables
_DEFAULT_GB = "50"
FRESH = 10.0  # seconds in which a process that has been given a copy has opened it
_ABANDONED = 86400.0  # seconds after which nobody fetches any more

_checked: dict[Path, tuple[int, ...]] = {}  # copies that this process has hashed
_held: list[int] = []  # descriptors of copies that this process keeps in the cache


def local_copy(path: Path, sha256: str) -> Path:
    """A local file of the same content: itself, or a copy in the cache, its hash compared.

    The cache holds what was used last, up to its size; a copy that was damaged there is fetched
    again. Raises UserError where the content has another hash, or cannot be had.
    """
    if not is_remote(path):
        return path
    copy = _folder("shards") / sha256
    if not _is_sound(copy, sha256):

        def check(fetched: Path) -> None:
            if sha256_of_file(fetched) != sha256:
                raise UserError(
                    f"{path}: damaged, its hash is not the manifest's: restore it, or share the "
                    "folder again"
                )

        _fetch(path, copy, check)
        _checked[copy] = _state(copy)
    _touch(copy)
    return copy


@contextmanager
def kept_copies(folder: Path) -> Iterator[Callable[[Path, str], Path]]:
    """As `local_copy`, for files of one folder that are all needed at a time.

    Their copies stay until the block ends, also where they are more than the cache holds.
    """
    if not is_remote(folder):
        yield local_copy
        return
    with _temporary(_folder("shards")) as kept:

        def keep(path: Path, sha256: str) -> Path:
            link = Path(kept) / sha256
            if not link.exists():  # shards without rows are all alike
                copy = local_copy(path, sha256)
                try:
                    os.link(copy, link)
                except OSError:  # a file system without links, or another user's file
                    shutil.copyfile(copy, link)
            return link

        yield keep


def local_version(path: Path) -> Path:
    """A local file of the same content as it is now: itself, or a copy of the same suffixes.

    The copy stays in the cache as long as this process lives.
    """
    if not is_remote(path):
        return path
    copy = _folder("files") / (version_of(path) + "".join(path.suffixes[-2:]))
    while True:
        if not copy.exists():
            _fetch(path, copy, lambda _: None)
        _touch(copy)
        with suppress(FileNotFoundError):  # another process has made room just now
            descriptor = os.open(copy, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _held.append(descriptor)
            if copy.exists():
                return copy


def _folder(kind: str) -> Path:
    folder = Path(os.environ.get(FOLDER, "~/.cache/qpipe")).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _temporary(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the cache cannot be written ({error.strerror}): give another folder in {FOLDER}"
    )


def _is_sound(copy: Path, sha256: str) -> bool:
    """Whether a copy is there and whole; it is read once a process, and after any change."""
    try:
        if _checked.get(copy) != _state(copy):
            if sha256_of_file(copy) != sha256:
                return False
            _checked[copy] = _state(copy)
    except FileNotFoundError:
        return False
    return True


def _state(copy: Path) -> tuple[int, ...]:
    stat = copy.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _touch(copy: Path) -> None:
    """Note that a copy is used now: in its time of access, as that of change tells of damage."""
    with suppress(OSError):  # of another user's cache, or gone just now
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))


def _fetch(path: Path, copy: Path, check: Callable[[Path], None]) -> None:
    limit = _limit()
    with _temporary(copy.parent) as folder:
        fetched = Path(folder) / copy.name
        fetch(path, fetched)
        check(fetched)
        os.replace(fetched, copy)
    _touch(copy)
    _shrink(copy.parent.parent, copy, limit)


def _limit() -> float:
    """The size of the cache, bytes."""
    words = os.environ.get(SIZE, _DEFAULT_GB)
    with suppress(ValueError):
        limit = float(words) * 1e9
        if 0 <= limit < math.inf:
            return limit
    raise UserError(f"{SIZE}={words}: give the size of the cache in GB, as in 50")


def _shrink(cache: Path, latest: Path, limit: float) -> None:
    """Remove the copies that were used longest ago until the rest fit, never the latest."""
    found: list[tuple[os.stat_result, Path]] = []
    for path in cache.glob("*/*"):
        with suppress(FileNotFoundError):  # another process shrinks it too
            found.append((path.stat(), path))
    now = time.time()
    for stat, path in found:
        if path.name.startswith(".fetch-") and now - stat.st_mtime > _ABANDONED:
            for file in path.iterdir():
                file.unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()
    copies = [(stat, path) for stat, path in found if path.is_file()]
    size = sum(stat.st_size for stat, _ in copies)
    for stat, path in sorted(copies, key=lambda one: one[0].st_atime):
        if size <= limit or now - stat.st_atime < FRESH:
            break
        if path != latest and _remove(path):
            size -= stat.st_size


def _remove(copy: Path) -> bool:
    """Remove a copy, unless a process holds it."""
    with suppress(OSError):
        descriptor = os.open(copy, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copy.unlink()
            return True
        finally:
            os.close(descriptor)
    return False
