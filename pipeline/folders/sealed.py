"""Reading the shards of a sealed folder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError, one_line
from ..format.arrow import decode
from ..format.arrow_limits import refuse_bombs
from ..format.batches import FlatBatch, split
from ..format.records import ScoredExample, TargetExample
from ..format.schema import Schema, packing_of, schema_of
from ..storage.cache import local_copy
from ..storage.files import sha256_of_file
from ..storage.remote import open_path
from .manifest import Manifest, ShardEntry, read_manifest
from .shards import COUNTED


def read_shard(
    folder: Path, manifest: Manifest, entry: ShardEntry, *, verify: bool = True
) -> Iterator[FlatBatch]:
    """The record batches of one shard, decoded; `verify` compares its hash first.

    Raises UserError where the shard is missing, damaged, or holds less or more than the manifest
    says.
    """
    path, schema = folder / entry.file, folder_schema(manifest)
    left = {level: getattr(entry, name) for level, name in COUNTED.items()}
    for number, stored in enumerate(stored_batches(folder, manifest, entry, verify=verify)):
        batch = decode(schema, stored, f"{path}, record batch {number}")
        for level, lengths in batch.lengths.items():
            left[level] -= int(lengths.sum())
        left["row"] -= len(batch.ids)
        yield batch
    for level, name in COUNTED.items():
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
    packing = packing_of(identity.settings, manifest.frequent_ids)
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
