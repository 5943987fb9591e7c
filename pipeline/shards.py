"""Shards on disk, written whole or not at all, and reading them.

A shard is `shard-00000.arrow` (Arrow IPC file, zstd) with its sidecar `shard-00000.json`. The Arrow
file is renamed into place first, so a sidecar always speaks of a finished file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import UserError, one_line
from .format.arrow import decode, encode
from .format.arrow_limits import refuse_bombs
from .format.batches import FlatBatch, flatten, split
from .format.records import Example, Reject, ScoredExample, TargetExample
from .format.schema import Schema, packing_of, schema_of
from .manifest import Manifest, ShardEntry, read_manifest, shard_name
from .plausible import check_entry
from .storage.cache import local_copy
from .storage.files import atomic_file, read_bytes, sha256_of_file
from .storage.json_files import json_bytes, parse_json, sha256_of_json, write_readable
from .storage.remote import is_remote, open_path

BATCH_ROWS = 64  # rows of a record batch: what a reader must hold at least


def _zstd(level: int) -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=level))


# of scores, level 9 would take off one per cent more in twelve times the time
COMPRESSED = {ScoredExample: _zstd(3), TargetExample: _zstd(9)}
# what the manifest counts at each level
_COUNTED = {"row": "rows", "token": "tokens", "position": "positions", "entry": "entries"}


@dataclass(slots=True)
class ShardContent:
    """What a stage makes of one shard's rows."""

    batches: list[FlatBatch] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    def add_sums(self, **values: float) -> None:
        """Add to the shard's sums."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)


def batches_of(schema: Schema, examples: Sequence[Example]) -> list[FlatBatch]:
    """Examples as batches of `BATCH_ROWS` rows."""
    return [
        flatten(schema, examples[start : start + BATCH_ROWS])
        for start in range(0, len(examples), BATCH_ROWS)
    ]


def sidecar_path(folder: Path, index: int) -> Path:
    """The sidecar of shard `index`."""
    return folder / shard_name(index).replace(".arrow", ".json")


def commit_shard(
    folder: Path, index: int, schema: Schema, fingerprint: str, content: ShardContent
) -> ShardEntry:
    """Write a shard and its sidecar."""
    path = folder / shard_name(index)
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        sink = pa.PythonFile(hashing, "w")
        with pa.ipc.new_file(sink, schema.arrow, options=COMPRESSED[schema.record]) as writer:
            for batch in content.batches:
                writer.write_batch(encode(schema, batch))
    entry = ShardEntry(
        file=path.name,
        fingerprint=fingerprint,
        rows=sum(len(batch.ids) for batch in content.batches),
        tokens=_total(content.batches, "token"),
        positions=_total(content.batches, "position"),
        entries=_total(content.batches, "entry"),
        bytes=hashing.size,
        sha256=hashing.digest.hexdigest(),
        rejects=[asdict(reject) for reject in content.rejects],
        sums=content.sums,
    )
    write_sidecar(folder, index, entry)
    return entry


def write_sidecar(folder: Path, index: int, entry: ShardEntry) -> None:
    """Write what is known of a shard beside it, with a hash over all that it says."""
    write_readable(sidecar_path(folder, index), sidecar_bytes(entry))


def sidecar_bytes(entry: ShardEntry) -> bytes:
    """A sidecar's content."""
    value = asdict(entry)
    return json_bytes(value | {"seal": sha256_of_json(value)})


def read_sidecar(folder: Path, index: int) -> ShardEntry:
    """A shard as its sidecar describes it. Raises UserError where that is damaged."""
    path = sidecar_path(folder, index)
    content = read_bytes(path)
    value = parse_json(path, content)
    try:
        said = {name: each for name, each in value.items() if name != "seal"}
        entry = ShardEntry(**said)
        check_entry(entry, shard_name(index), entry.fingerprint)
        is_sealed = sidecar_bytes(entry) == content
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged, not a sidecar ({one_line(error)}): remove it and run again"
        ) from error
    if not is_sealed:
        raise UserError(
            f"{path}: damaged or changed, its seal is not that of its content: remove it and run "
            "again"
        )
    return entry


def committed_shard(
    folder: Path, index: int, fingerprint: str, *, verify: bool = True
) -> ShardEntry | None:
    """The sidecar of a shard, if it speaks of the very file that is there.

    `verify` compares its hash, else its size alone.
    """
    if not sidecar_path(folder, index).exists():
        return None
    entry = read_sidecar(folder, index)
    path = folder / shard_name(index)
    whole = entry.fingerprint == fingerprint and _is_whole(path, entry, verify)
    return entry if whole else None


def _is_whole(path: Path, entry: ShardEntry, verify: bool) -> bool:
    try:
        if path.stat().st_size != entry.bytes:
            return False
    except FileNotFoundError:
        return False
    # a remote one was put there whole or not at all
    return is_remote(path) or not verify or sha256_of_file(path) == entry.sha256


def read_shard(
    folder: Path, manifest: Manifest, entry: ShardEntry, *, verify: bool = True
) -> Iterator[FlatBatch]:
    """The record batches of one shard, decoded; `verify` compares its hash first.

    Raises UserError where the shard is missing, damaged, or holds less or more than the manifest
    says.
    """
    path, schema = folder / entry.file, folder_schema(manifest)
    left = {level: getattr(entry, name) for level, name in _COUNTED.items()}
    for number, stored in enumerate(stored_batches(folder, manifest, entry, verify=verify)):
        batch = decode(schema, stored, f"{path}, record batch {number}")
        for level, lengths in batch.lengths.items():
            left[level] -= int(lengths.sum())
        left["row"] -= len(batch.ids)
        yield batch
    for level, name in _COUNTED.items():
        if left[level]:
            said = getattr(entry, name)
            found = said - left[level]
            raise UserError(
                f"{path}: holds {found:,} {name}, the manifest says {said:,}: make {folder} again"
            )


def stored_batches(
    folder: Path, manifest: Manifest, entry: ShardEntry, *, verify: bool = True
) -> Iterator[pa.RecordBatch]:
    """The record batches of one shard as they are stored; `verify` compares its hash first."""
    path = folder / entry.file
    if not path.is_file():
        raise UserError(
            f"{path}: missing, the manifest names it: restore it, or remove {folder} and make it "
            "again"
        )
    local = local_copy(path, entry.sha256)
    if verify and sha256_of_file(local) != entry.sha256:
        raise UserError(f"{path}: damaged, its hash is not the manifest's: make {folder} again")
    with _opened(path, local, folder_schema(manifest)) as reader:
        for number in range(reader.num_record_batches):
            yield _get(reader, number)


def read_rows(
    folder: Path,
    manifest: Manifest,
    shard: int,
    wanted: Iterable[tuple[int, NDArray[np.integer]]],
) -> Iterator[FlatBatch]:
    """Some rows of some record batches of a shard, decoded; compares no hash.

    `wanted` names a record batch and the rows of it, as often as there are batches to read.
    """
    entry = manifest.shards[shard]
    path = folder / entry.file
    schema = folder_schema(manifest)
    with _opened(path, local_copy(path, entry.sha256), schema) as reader:
        for number, rows in wanted:
            batch = _get(reader, number)
            if not np.array_equal(rows, np.arange(batch.num_rows)):
                batch = batch.take(pa.array(rows))
            yield decode(schema, batch, f"{path}, some rows of record batch {number}")


def shard_ids(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[list[str]]:
    """The ids of a shard's rows, batch by batch; reads nothing else and compares no hash."""
    path = folder / entry.file
    local = local_copy(path, entry.sha256)
    with _opened(path, local, folder_schema(manifest), columns=[0]) as reader:
        batches = range(reader.num_record_batches)
        return [_get(reader, number).column("id").to_pylist() for number in batches]


@contextmanager
def _opened(
    path: Path, local: Path, schema: Schema, columns: list[int] | None = None
) -> Iterator[pa.RecordBatchFileReader]:
    """A shard to read; nothing of it is unpacked before its columns and sizes are known."""
    # buffers are small: threads cost more than they save, and there is a reader for each core
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    try:
        with pa.OSFile(str(local)) as file:
            refuse_bombs(file)
            with pa.ipc.open_file(file, options=options) as reader:
                wanted = (
                    schema.arrow if columns is None else pa.schema(map(schema.arrow.field, columns))
                )
                if reader.schema != wanted:
                    raise UserError(f"{path}: its columns are not those of this format")
                yield reader
    except (pa.ArrowException, OSError) as error:
        what = "damaged" if path.exists() else "missing"
        raise UserError(f"{path}: {what}: {one_line(error)}") from error


def _get(reader: pa.RecordBatchFileReader, number: int) -> pa.RecordBatch:
    batch = reader.get_batch(number)
    batch.validate(full=True)  # or lists that point astray would end the process
    return batch


def folder_schema(manifest: Manifest) -> Schema:
    """The schema of a sealed folder's shards."""
    identity = manifest.identity
    packing = packing_of(identity.settings, manifest.frequent_ids, identity.format_version)
    return schema_of(identity.stage, identity.settings["vocab_size"], packing)


def read_scores(folder: str | Path, *, verify: bool = True) -> Iterator[ScoredExample]:
    """The scored examples of a folder made by `qpipe score`, in order, one shard at a time.

    `verify` compares every shard's hash when it is opened. Raises UserError where the folder is no
    sealed score folder or a shard is missing or damaged.
    """
    yield from _read_records(open_path(folder), "score", verify)


def read_targets(folder: str | Path, *, verify: bool = True) -> Iterator[TargetExample]:
    """The target examples of a folder made by `qpipe build-targets`, in order, one shard at a time.

    `verify` compares every shard's hash when it is opened. Raises UserError where the folder is no
    sealed target folder or a shard is missing or damaged.
    """
    yield from _read_records(open_path(folder), "build-targets", verify)


def _read_records(folder: Path, stage: str, verify: bool) -> Iterator[Any]:
    manifest = read_manifest(folder, stage)
    schema = folder_schema(manifest)
    for entry in manifest.shards:
        for batch in read_shard(folder, manifest, entry, verify=verify):
            yield from split(schema, batch)


def _total(batches: Iterable[FlatBatch], level: Any) -> int:
    return sum(int(batch.lengths[level].sum()) for batch in batches)


class _HashingFile:
    """A file to write that knows the hash and size of what went through it."""

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
        """Left open: the block that opened the file still syncs it."""
        self.closed = True
