"""Files behind URLs: `s3://`, `gs://`, `hf://`, `memory://` and others that fsspec supports.

A remote path has the interface of a local path (universal_pathlib), so most code works with both.
The differences: objects are uploaded as a whole, shards are read from local copies (`cache`), and
folders are locked by leases (`locks`).
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from ..errors import UserError, one_line

_BUCKETS = ("s3", "s3a", "gs", "gcs")  # stores whose folders are in buckets


def open_path(words: str | Path) -> Path:
    """The path of a local path or URL. Raises UserError if it cannot be used."""
    if not isinstance(words, str):
        return words
    protocol, is_url, place = words.partition("://")
    if not is_url or protocol == "file":
        path = _local(words) if is_url else Path(words)
        if "\0" in str(path):  # from %00 in a URL
            raise UserError(f"{str(path)!r}: a name cannot hold the character NUL: give another")
        return path
    if protocol in _BUCKETS and not place.split("/")[0]:
        raise UserError(f"{words}: names no bucket: give {protocol}://BUCKET/FOLDER")
    from .remote_path import RemotePath, unusable  # importing fsspec is slow

    try:
        # without a cache of listings: other machines work in the same folder
        path = RemotePath(words, use_listings_cache=False)
        path.exists()  # fails here if the store cannot be reached or refuses access
    except UserError:
        raise
    except Exception as error:  # each kind of store raises its own
        raise unusable(words, error) from error
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path stands for a URL."""
    return not isinstance(path, Path)


@contextmanager
def remote_file(path: Path, create: bool = False) -> Iterator[BinaryIO]:
    """Open a local file that is uploaded to `path` if the block ends without an error.

    With `create` the store refuses to replace an object (S3: `If-None-Match: *`), and
    FileExistsError is raised.
    """
    with nameless_file() as (file, local):
        try:
            yield file
            file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise UserError(f"{where}: cannot be written: {error.strerror or error}") from error
        if create:
            _create(path, local)
            return
        with _store(path, "written") as (store, place):
            store.put_file(str(local), place)


def _create(path: Path, local: Path) -> None:
    if path.exists():  # some stores ignore the mode
        raise FileExistsError(path)
    try:
        with _store(path, "written") as (store, place):
            store.put_file(str(local), place, mode="create")
    except UserError as error:
        if path.exists():
            raise FileExistsError(path) from error
        raise


@contextmanager
def nameless_file() -> Iterator[tuple[BinaryIO, Path]]:
    """A temporary file that disappears with this process, and a path to open it by."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: cannot be written: {error.strerror}") from error
    with file:
        yield cast(BinaryIO, file), Path(f"/proc/self/fd/{file.fileno()}")


def fetch(path: Path, local: Path) -> None:
    """Copy a remote file to a local one."""
    with _store(path, "read") as (store, place):
        store.get_file(place, str(local))


def forget_listing(path: Path) -> None:
    """Clear the listings that the file system of a remote path has cached, as the hub's does."""
    with _store(path, "read") as (store, _):
        store.invalidate_cache()


def version_of(path: Path) -> str | None:
    """A hash that changes when a remote file does; None if its server does not tell."""
    with _store(path, "read") as (store, place):
        state = store.ukey(place)
        if _is_web(path):  # where this key is the URL alone
            found = store.info(place)
            state = [found.get(name) for name in ("ETag", "Last-Modified", "size")]
            if state[:2] == [None, None]:
                return None
        return hashlib.sha256(f"{path}\n{state}".encode()).hexdigest()


def public_name(path: Path) -> str:
    """The name of a file, without the query of a web address, which may be a signature."""
    return path.name.partition("?")[0] if is_remote(path) and _is_web(path) else path.name


def _is_web(path: Path) -> bool:
    return cast(Any, path).protocol in ("http", "https")


@contextmanager
def _store(path: Path, use: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a remote path, and the place there; its errors as UserErrors."""
    remote = cast(Any, path)
    try:
        yield remote.fs, remote.path
    except Exception as error:
        is_missing = use == "read" and isinstance(error, FileNotFoundError)
        what = "no such file" if is_missing else f"cannot be {use}: {one_line(error)}"
        raise UserError(f"{path}: {what}") from error


def _local(words: str) -> Path:
    parts = urlsplit(words)
    if parts.netloc not in ("", "localhost"):
        raise UserError(
            f"{words}: names the machine {parts.netloc}: give file:///{parts.netloc}{parts.path} "
            "or a path for a file on this machine"
        )
    # a question mark is part of the name
    return Path(unquote(words.split("://", 1)[1].removeprefix(parts.netloc)))
