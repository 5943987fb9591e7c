"""Folders behind URLs: `s3://`, `gs://`, `hf://`, `memory://` and whatever else fsspec knows.

A remote path has the interface of a local one (universal_pathlib), so the code above works with
both. Only this file and those that import it tell them apart: an object is put in its place as a
whole, shards are read from local copies (`cache`), and who works in a folder leaves a lease there
(`locks`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from .errors import UserError, one_line


def open_path(words: str | Path) -> Path:
    """What a path or a URL names. Raises UserError for a URL that cannot be used here."""
    if isinstance(words, Path) or "://" not in words:
        return Path(words)
    if words.startswith("file://"):
        return Path(unquote(urlsplit(words).path))
    from upath import UPath

    try:
        # listings are not to be remembered: other machines work in the same folder
        path = UPath(words, use_listings_cache=False)
        path.exists()  # whoever cannot be reached, or lets nobody in, says so here
    except Exception as error:  # each kind of store raises its own
        raise _unreachable(words, error) from error
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path is a URL's."""
    return not isinstance(path, Path)


@contextmanager
def remote_file(path: Path) -> Iterator[BinaryIO]:
    """A local file to write that is put in its remote place when the block ends well."""
    with tempfile.NamedTemporaryFile(prefix="qpipe-") as file:
        yield cast(BinaryIO, file)
        file.flush()
        store, place = _store(path)
        try:
            store.put_file(file.name, place)
        except Exception as error:
            raise UserError(f"{path}: cannot be written: {one_line(error)}") from error


def fetch(path: Path, local: Path) -> None:
    """Copy a remote file to a local one."""
    store, place = _store(path)
    try:
        store.get_file(place, str(local))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def read_remote(path: Path) -> bytes:
    """The content of a remote file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def _store(path: Path) -> tuple[Any, str]:
    """The file system of fsspec that a remote path lies in, and its place there."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def _unreachable(words: str, error: Exception) -> UserError:
    hint = ""
    if isinstance(error, ImportError):
        hint = ": pip install 'qpipe[s3]', or the package that fsspec names for it"
    return UserError(f"{words}: cannot be used: {one_line(error)}{hint}")
