"""Chooses the reader of a file by its name."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ....pipeline.errors import UserError
from ....pipeline.storage.cache import local_version
from ....pipeline.storage.files import refuse_irregular
from ....pipeline.storage.remote import public_name
from .columnar import arrow_reader, parquet_reader
from .reader import Reader, Version
from .text import COMPRESSIONS, csv_reader, json_reader, suffixes

FILE_KINDS: Mapping[str, Callable[[Path], Reader]] = {
    ".jsonl": json_reader,
    ".ndjson": json_reader,
    ".json": json_reader,
    ".parquet": parquet_reader,
    ".arrow": arrow_reader,
    ".feather": arrow_reader,
    ".ipc": arrow_reader,
    ".csv": csv_reader,
    ".tsv": csv_reader,
}
_TEXT = (json_reader, csv_reader)
OTHER_FILES = (
    ".txt",
    ".xml",
    ".yaml",
    ".zip",
    ".bz2",
    ".xz",
)  # not names of data sets


def file_reader(path: Path) -> Reader:
    """The reader of a file, or of a local copy of it. Raises UserError for an unknown suffix."""
    name = Path(public_name(path))
    suffix, compression = suffixes(name)
    kind = FILE_KINDS.get(suffix)
    if kind is None or (compression and kind not in _TEXT):
        raise UserError(
            f"demonstrations {path}: unknown kind of file {name.suffix!r}; known are "
            f"{', '.join(FILE_KINDS)}, those of text also with {' or '.join(COMPRESSIONS)} after it"
        )
    local = local_version(path)
    refuse_irregular(local)
    return kind(local)._replace(version=lambda: _version(local))


def _version(path: Path) -> Version:
    with suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
