"""Shards on disk, written whole or not at all, and reading them.

A shard is `shard-00000.arrow` (Arrow IPC file, zstd) with its sidecar `shard-00000.json`. The Arrow
file is renamed into place first, so a sidecar always speaks of a finished file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .codec import FlatBatch, decode, encode, flatten, split
from .errors import UserError
from .manifest import Manifest, ShardEntry, read_manifest, shard_name
from .records import Example, Reject, ScoredExample, TargetExample
from .schema import Schema, packing_of, schema_of
from .storage import atomic_file, read_json, sha256_of_file, write_json

BATCH_ROWS = 64  # rows of a record batch: what a reader must hold at least


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
    return folder / Path(shard_name(index)).with_suffix(".json")


def commit_shard(
    folder: Path, index: int, schema: Schema, fingerprint: str, content: ShardContent
) -> ShardEntry:
    """Write a shard and its sidecar."""
    path = folder / shard_name(index)
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=9))
        with pa.ipc.new_file(pa.PythonFile(hashing, "w"), schema.arrow, options=options) as writer:
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
    write_json(sidecar_path(folder, index), asdict(entry))
    return entry


def committed_shard(folder: Path, index: int, fingerprint: str) -> ShardEntry | None:
    """The sidecar of a shard, if it speaks of the very file that is there."""
    sidecar = sidecar_path(folder, index)
    if not sidecar.exists():
        return None
    try:
        entry = ShardEntry(**read_json(sidecar))
    except TypeError as error:
        raise UserError(f"{sidecar}: damaged, not a sidecar: remove it and run again") from error
    path = folder / shard_name(index)
    whole = path.exists() and sha256_of_file(path) == entry.sha256
    return entry if whole and entry.fingerprint == fingerprint else None


def read_shard(
    folder: Path, manifest: Manifest, entry: ShardEntry, *, verify: bool = True
) -> Iterator[FlatBatch]:
    """The record batches of one shard, decoded; `verify` compares its hash first."""
    schema = folder_schema(manifest)
    for number, batch in enumerate(stored_batches(folder, entry, verify=verify)):
        yield decode(schema, batch, f"{folder / entry.file}, record batch {number}")


def stored_batches(
    folder: Path, entry: ShardEntry, *, verify: bool = True
) -> Iterator[pa.RecordBatch]:
    """The record batches of one shard as they are stored; `verify` compares its hash first."""
    path = folder / entry.file
    if not path.exists():
        raise UserError(
            f"{path}: missing, the manifest names it: restore it, or remove {folder} and make it "
            "again"
        )
    if verify and sha256_of_file(path) != entry.sha256:
        raise UserError(f"{path}: damaged, its hash is not the manifest's: make {folder} again")
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)  # or lists that point astray would end the process
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error


def read_rows(
    folder: Path,
    manifest: Manifest,
    shard: int,
    wanted: Iterable[tuple[int, NDArray[np.integer]]],
) -> Iterator[FlatBatch]:
    """Some rows of some record batches of a shard, decoded; compares no hash.

    `wanted` names a record batch and the rows of it, as often as there are batches to read.
    """
    path = folder / manifest.shards[shard].file
    schema = folder_schema(manifest)
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            for number, rows in wanted:
                batch = reader.get_batch(number)
                batch.validate(full=True)  # or lists that point astray would end the process
                if not np.array_equal(rows, np.arange(batch.num_rows)):
                    batch = batch.take(pa.array(rows))
                yield decode(schema, batch, f"{path}, record batch {number}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: missing or damaged: {error}") from error


def shard_ids(folder: Path, entry: ShardEntry) -> list[list[str]]:
    """The ids of a shard's rows, batch by batch; reads nothing else and compares no hash."""
    path = folder / entry.file
    options = pa.ipc.IpcReadOptions(included_fields=[0])
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file, options=options) as reader:
            batches = range(reader.num_record_batches)
            return [reader.get_batch(number).column("id").to_pylist() for number in batches]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: missing or damaged: {error}") from error


def folder_schema(manifest: Manifest) -> Schema:
    """The schema of a sealed folder's shards."""
    packing = packing_of(manifest.settings, manifest.frequent_ids)
    return schema_of(manifest.identity.stage, manifest.settings["vocab_size"], packing)


def read_scores(folder: str | Path) -> Iterator[ScoredExample]:
    """The scored examples of a folder made by `qpipe score`, in order, one shard at a time.

    Raises UserError where the folder is no sealed score folder or a shard is missing or damaged.
    """
    yield from _read_records(Path(folder), "score")


def read_targets(folder: str | Path) -> Iterator[TargetExample]:
    """The target examples of a folder made by `qpipe build-targets`, in order, one shard at a time.

    Raises UserError where the folder is no sealed target folder or a shard is missing or damaged.
    """
    yield from _read_records(Path(folder), "build-targets")


def _read_records(folder: Path, stage: str) -> Iterator[Any]:
    manifest = read_manifest(folder, stage)
    schema = folder_schema(manifest)
    for entry in manifest.shards:
        for batch in read_shard(folder, manifest, entry):
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
