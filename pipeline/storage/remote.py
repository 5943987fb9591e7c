"""Folders behind URLs: `s3://`, `gs://`, `hf://`, `memory://` and whatever else fsspec knows.

A remote path has the interface of a local one (universal_pathlib), so the code above works with
both. Only this file and those that import it tell them apart: an object is put in its place as a
whole, shards are read from local copies (`cache`), and who works in a folder leaves a lease there
(`locks`).
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from ..errors import UserError, one_line

_BUCKETS = ("s3", "s3a", "gs", "gcs")  # stores in which a folder lies in a bucket


def open_path(words: str | Path) -> Path:
    """What a path or a URL names. Raises UserError for what names nothing that can be used here."""
    if not isinstance(words, str):
        return words
    protocol, is_url, place = words.partition("://")
    if not is_url or protocol == "file":
        path = _local(words) if is_url else Path(words)
        if "\0" in str(path):  # which a URL can write as %00
            raise UserError(f"{str(path)!r}: a name cannot hold the character NUL: give another")
        return path
    if protocol in _BUCKETS and not place.split("/")[0]:
        raise UserError(f"{words}: names no bucket: give {protocol}://BUCKET/FOLDER")
    from .remote_path import RemotePath, unusable  # importing fsspec is slow

    try:
        # listings are not to be remembered: other machines work in the same folder
        path = RemotePath(words, use_listings_cache=False)
        path.exists()  # whoever cannot be reached, or lets nobody in, says so here
    except UserError:
        raise
    except Exception as error:  # each kind of store raises its own
        raise unusable(words, error) from error
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path is a URL's."""
    return not isinstance(path, Path)


@contextmanager
def remote_file(path: Path) -> Iterator[BinaryIO]:
    """A local file to write that is put in its remote place when the block ends well."""
    with nameless_file() as (file, local):
        try:
            yield file
            file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise UserError(f"{where}: cannot be written: {error.strerror or error}") from error
        store, place = _store(path)
        try:
            store.put_file(str(local), place)
        except Exception as error:
            raise UserError(f"{path}: cannot be written: {one_line(error)}") from error


@contextmanager
def nameless_file() -> Iterator[tuple[BinaryIO, Path]]:
    """A temporary file that is gone with this process, however that ends, and a way to open it."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: cannot be written: {error.strerror}") from error
    with file:
        yield cast(BinaryIO, file), Path(f"/proc/self/fd/{file.fileno()}")


def fetch(path: Path, local: Path) -> None:
    """Copy a remote file to a local one."""
    store, place = _store(path)
    try:
        store.get_file(place, str(local))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def forget_listing(path: Path) -> None:
    """Forget what a remote path's file system remembers, as the hub's does, of what lies there."""
    _store(path)[0].invalidate_cache()


def version_of(path: Path) -> str:
    """A hash that changes when a remote file does."""
    store, place = _store(path)
    try:
        version = store.ukey(place)
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    return hashlib.sha256(f"{path}\n{version}".encode()).hexdigest()


def _store(path: Path) -> tuple[Any, str]:
    """The file system of fsspec that a remote path lies in, and its place there."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def _local(words: str) -> Path:
    parts = urlsplit(words)
    if parts.netloc not in ("", "localhost"):
        raise UserError(
            f"{words}: names the machine {parts.netloc}, not a place on this one: give "
            f"file:///{parts.netloc}{parts.path} or a path"
        )
    # what looks like a query is part of the name
    return Path(unquote(words.split("://", 1)[1].removeprefix(parts.netloc)))
