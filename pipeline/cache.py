"""Local copies of remote shards, under a limit."""

import os
import tempfile
from pathlib import Path

from .errors import UserError
from .remote import fetch, is_remote
from .storage import sha256_of_file

FOLDER, SIZE = "QPIPE_CACHE", "QPIPE_CACHE_GB"  # environment variables
_DEFAULT_GB = "50"


def local_copy(path: Path, sha256: str) -> Path:
    """A local file of the same content: itself, or a copy in the cache, its hash compared.

    The cache holds what was used last, up to its size. Raises UserError where the content has
    another hash, or cannot be had.
    """
    if not is_remote(path):
        return path
    folder = Path(os.environ.get(FOLDER, "~/.cache/qpipe")).expanduser() / "shards"
    copy = folder / sha256
    if copy.exists():
        os.utime(copy)
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as fetching:
        fetched = Path(fetching) / sha256
        fetch(path, fetched)
        if sha256_of_file(fetched) != sha256:
            raise UserError(f"{path}: damaged, its hash is not the manifest's")
        os.replace(fetched, copy)
    _shrink(folder, copy)
    return copy


def _shrink(folder: Path, latest: Path) -> None:
    """Remove the copies that were used longest ago until the rest fit, never the latest."""
    words = os.environ.get(SIZE, _DEFAULT_GB)
    try:
        limit = float(words) * 1e9
    except ValueError:
        raise UserError(f"{SIZE}={words}: give the size of the cache in GB, as in 50") from None
    found = [(each.stat(), each) for each in folder.iterdir() if each.is_file()]
    size = sum(stat.st_size for stat, _ in found)
    for stat, each in sorted(found, key=lambda one: one[0].st_mtime):
        if size <= limit or each == latest:
            break
        each.unlink(missing_ok=True)  # who reads it has it open, and reads on
        size -= stat.st_size
