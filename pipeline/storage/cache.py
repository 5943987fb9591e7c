"""A size-limited cache of remote files: shards by their hash, others by version and hash."""

import atexit
import fcntl
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import sha256_of_file
from .remote import fetch, is_remote, public_name, version_of

FOLDER, SIZE = "QPIPE_CACHE", "QPIPE_CACHE_GB"  # environment variables
_DEFAULT_GB = "50"
FRESH = 10.0  # seconds within which a process opens the copy that it was given
_ABANDONED = 86400.0  # seconds after which a download is no longer in progress

_checked: dict[Path, tuple[int, ...]] = {}  # copies that this process has hashed
_held: list[int] = []  # descriptors of copies that this process keeps in the cache
# bytes that this process may fetch into a cache of a limit before it lists the cache again
_room: dict[tuple[Path, float], float] = {}


def local_copy(path: Path, sha256: str) -> Path:
    """The file itself if it is local, else a copy in the cache with the given hash.

    The cache keeps the copies used last, up to its size; a damaged copy is fetched again. Raises
    UserError if the content has another hash, or cannot be fetched.
    """
    if not is_remote(path):
        return path
    copy = _cache() / "shards" / sha256
    if not _is_sound(copy, sha256):
        _fetch(path, copy.parent, lambda found: found, sha256)
        _checked[copy] = _state(copy)
    _touch(copy)
    return copy


@contextmanager
def opened_copy(path: Path, sha256: str) -> Iterator[Path]:
    """As `local_copy`; the path can be read until the block ends, also if the cache lets it go."""
    if not is_remote(path):
        yield path
        return
    while True:
        with suppress(FileNotFoundError):  # another process has just removed the copy
            descriptor = os.open(local_copy(path, sha256), os.O_RDONLY)
            break
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def kept_copies(folder: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Yield a function like `local_copy` whose copies stay until the block ends.

    For files of one folder that are needed together, also if they exceed the size of the cache.
    """
    if not is_remote(folder):
        yield local_copy
        return
    with _temporary(_cache() / "shards") as kept:

        def keep(path: Path, sha256: str) -> Path:
            link = Path(kept) / sha256
            if not link.exists():  # equal shards share a copy
                with opened_copy(path, sha256) as copy:
                    try:
                        os.link(copy, link)
                    except OSError:  # a file system without links, or another user's file
                        shutil.copyfile(copy, link)
            return link

        yield keep


def local_version(path: Path) -> Path:
    """The file itself if it is local, else a copy of its present version with the same suffixes.

    The copy stays in the cache until this process ends; without a version it is removed then.
    """
    if not is_remote(path):
        return path
    folder, version = _cache() / "files", version_of(path)
    suffixes = "".join(Path(public_name(path)).suffixes[-2:])
    while True:
        copy = _copy_of_version(folder, version) if version else None
        if copy is None:
            key = version or secrets.token_hex(16)
            copy = _fetch(path, folder, lambda sha256, key=key: f"{key}-{sha256}{suffixes}")
            _checked[copy] = _state(copy)
            if version is None:
                atexit.register(copy.unlink, missing_ok=True)
        _touch(copy)
        with suppress(FileNotFoundError):  # another process has just removed the copy
            descriptor = os.open(copy, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _held.append(descriptor)
            if copy.exists():
                return copy


def _copy_of_version(folder: Path, version: str) -> Path | None:
    """The copy of a version of a file, if there is one whose content is still what it was."""
    for copy in folder.glob(f"{version}-*"):
        sha256 = copy.name.removeprefix(f"{version}-")[:64]
        if _is_sound(copy, sha256):
            return copy
        copy.unlink(missing_ok=True)
    return None


def _cache() -> Path:
    return Path(os.environ.get(FOLDER, "~/.cache/qpipe")).expanduser()


def _temporary(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
    except OSError as error:
        raise UserError(
            f"{folder}: the cache cannot be written ({error.strerror}): give another folder in "
            f"{FOLDER}"
        ) from error


def _is_sound(copy: Path, sha256: str) -> bool:
    """Whether a copy exists with its hash; hashes it once a process, and after any change."""
    try:
        if _checked.get(copy) != _state(copy):
            if sha256_of_file(copy) != sha256:
                return False
            _checked[copy] = _state(copy)
    except OSError:
        return False
    return True


def _state(copy: Path) -> tuple[int, ...]:
    stat = copy.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _touch(copy: Path) -> None:
    """Set the access time of a copy to now; its modification time, which `_state` reads, stays."""
    with suppress(OSError):  # another user's cache, or removed just now
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))


def _fetch(path: Path, place: Path, name: Callable[[str], str], sha256: str | None = None) -> Path:
    """Fetch a file into the cache, under a name made of its hash, and make room for it.

    Raises UserError if it has another hash than the one given.
    """
    limit = _limit()
    with _temporary(place) as folder:
        fetched = Path(folder) / "file"
        fetch(path, fetched)
        found = sha256_of_file(fetched)
        if sha256 not in (None, found):
            raise UserError(
                f"{path}: damaged, its hash is not the manifest's: restore it, or share the folder "
                "again"
            )
        copy = place / name(found)
        os.replace(fetched, copy)
    _touch(copy)
    key = place.parent, limit
    _room[key] = _room.get(key, 0.0) - copy.stat().st_size
    if _room[key] < 0:
        # other processes fetch too
        _room[key] = (limit - _shrink(place.parent, copy, limit)) / 8
    return copy


def _limit() -> float:
    """The size of the cache, bytes."""
    words = os.environ.get(SIZE, _DEFAULT_GB)
    with suppress(ValueError):
        limit = float(words) * 1e9
        if 0 <= limit < math.inf:
            return limit
    raise UserError(f"{SIZE}={words}: give the size of the cache in GB, as in 50")


def _shrink(cache: Path, latest: Path, limit: float) -> float:
    """Remove the copies used longest ago until the rest fit into the limit; keep the latest.

    Returns the bytes that are left.
    """
    found: list[tuple[os.stat_result, Path]] = []
    for path in cache.glob("*/*"):
        with suppress(FileNotFoundError):  # another process also shrinks the cache
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
    return size


def _remove(copy: Path) -> bool:
    """Remove a copy unless a process holds it."""
    with suppress(OSError):
        descriptor = os.open(copy, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copy.unlink()
            return True
        finally:
            os.close(descriptor)
    return False
