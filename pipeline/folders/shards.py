"""Writes a shard and its sidecar."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from ..errors import UserError
from ..format.arrow import encode
from ..format.batches import FlatBatch, flatten
from ..format.packing import ScorePacking
from ..format.records import Reject, ScoredExample, TargetExample
from ..format.schema import Schema
from ..storage.files import HashingFile, atomic_file, sha256_of_file
from ..storage.json_files import read_sealed, refuse_misfits, sealed_bytes, write_readable
from ..storage.remote import is_remote
from ..threads import in_order
from .manifest import ShardEntry, check_entry, shard_name
from .row_index import RowOutline, outline_as_json, outline_from_json, outline_of

BATCH_ROWS = 64  # rows of a record batch, the least that a reader holds in memory
BATCH_ENTRIES = 2**24  # a batch of several rows has no more; 64 rows of 4,096 tokens have as many


def _zstd(level: int) -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=level))


# level 9 would save one to three per cent more and take five to twelve times as long
COMPRESSED = _zstd(3)
_COMPRESSED_CODES = _zstd(1)  # of packed scores, which higher levels do not make smaller
# the field of the manifest that counts each level
COUNTED = {"row": "rows", "token": "tokens", "position": "positions", "entry": "entries"}


@dataclass(slots=True)
class ShardContent:
    """The rows of one shard, its rejects, and the sums over its rows."""

    batches: list[FlatBatch] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    def add_sums(self, **values: float) -> None:
        """Add values to the sums of the same names."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)


def batches_of(
    schema: Schema, examples: Sequence[ScoredExample | TargetExample]
) -> list[FlatBatch]:
    """Flatten examples into batches of `BATCH_ROWS` rows, or fewer with many entries."""
    cuts, entries = [0], 0
    for place, example in enumerate(examples):
        entries += int(example.counts.sum())
        if place - cuts[-1] == BATCH_ROWS or (entries > BATCH_ENTRIES and place > cuts[-1]):
            cuts.append(place)
            entries = int(example.counts.sum())
    return [
        flatten(schema, examples[start:stop])
        for start, stop in pairwise([*cuts, len(examples)])
        if stop > start
    ]


def sidecar_path(folder: Path, index: int) -> Path:
    """The sidecar of shard `index`."""
    return folder / shard_name(index).replace(".arrow", ".json")


def compression(schema: Schema) -> pa.ipc.IpcWriteOptions:
    """The compression of the shards of a schema."""
    return _COMPRESSED_CODES if isinstance(schema.packing, ScorePacking) else COMPRESSED


def commit_shard(
    folder: Path, index: int, schema: Schema, fingerprint: str, content: ShardContent
) -> ShardEntry:
    """Write a shard and its sidecar."""
    path = folder / shard_name(index)
    with atomic_file(path) as file:
        hashing = HashingFile(file)
        sink = pa.PythonFile(hashing, "w")
        with pa.ipc.new_file(sink, schema.arrow, options=compression(schema)) as writer:
            for encoded in in_order(partial(encode, schema), content.batches):
                writer.write_batch(encoded)
    entry = ShardEntry(
        file=path.name,
        fingerprint=fingerprint,
        rows=sum(len(batch.ids) for batch in content.batches),
        tokens=_total(content.batches, "token"),
        positions=_total(content.batches, "position"),
        entries=_total(content.batches, "entry"),
        bytes=hashing.size,
        sha256=hashing.digest.hexdigest(),
        rejects=content.rejects,
        sums=content.sums,
    )
    write_sidecar(folder, index, entry, outline_of(index, content.batches))
    return entry


def write_sidecar(
    folder: Path, index: int, entry: ShardEntry, outline: RowOutline | None = None
) -> None:
    """Write the sidecar of a shard, with a hash of all its values."""
    write_readable(sidecar_path(folder, index), sidecar_bytes(entry, outline))


def sidecar_bytes(entry: ShardEntry, outline: RowOutline | None = None) -> bytes:
    """The content of a sidecar; copies of a shard have one without an outline."""
    stated = {} if outline is None else {"outline": outline_as_json(outline)}
    return sealed_bytes(msgspec.structs.asdict(entry) | stated)


def read_sidecar(folder: Path, index: int) -> tuple[ShardEntry, RowOutline | None]:
    """Read a sidecar. Raises UserError if it is damaged."""
    path, way_out = sidecar_path(folder, index), "remove it and run again"
    value = read_sealed(path, dict[str, Any], "sidecar", way_out)
    with refuse_misfits(path, "sidecar", way_out):
        stated = value.pop("outline", None)
        outline = None if stated is None else outline_from_json(index, stated)
        entry = msgspec.convert(value, ShardEntry)
        check_entry(entry, index, entry.fingerprint)
    return entry, outline


def committed_shard(
    folder: Path, index: int, fingerprint: str, *, verify: bool = True
) -> ShardEntry | None:
    """The sidecar of a shard, if the shard is there as it describes; else None.

    Compares the size of the shard and, with `verify`, its hash.
    """
    if not sidecar_path(folder, index).exists():
        return None
    entry, _ = read_sidecar(folder, index)
    path = folder / shard_name(index)
    whole = entry.fingerprint == fingerprint and _is_whole(path, entry, verify)
    return entry if whole else None


def _is_whole(path: Path, entry: ShardEntry, verify: bool) -> bool:
    try:
        if path.stat().st_size != entry.bytes:
            return False
    except FileNotFoundError:
        return False
    # a remote file is written whole or not at all
    return is_remote(path) or not verify or sha256_of_file(path) == entry.sha256


def _total(batches: Iterable[FlatBatch], level: Any) -> int:
    return sum(int(batch.lengths[level].sum()) for batch in batches)


def refuse_incomplete(folder: Path, shards: Sequence[ShardEntry], way_out: str) -> None:
    """Raise UserError, ending with `way_out`, for a shard that is missing or has another size."""
    paths = [folder / entry.file for entry in shards]
    for path, entry, size in zip(paths, shards, in_order(_size, paths), strict=True):
        if size != entry.bytes:
            raise UserError(f"{path}: {'missing' if size is None else 'damaged'}, {way_out}")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
