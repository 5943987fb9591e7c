"""Reading a sealed folder: its manifest and the rows of its shards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from .manifest import Manifest, read_manifest
from .shards import COUNTED


@dataclass(frozen=True)
class SealedFolder:
    """A sealed folder: where it is, and its manifest.

    Methods take a shard by its index. They raise UserError where the shard is missing or damaged.
    """

    path: Path
    manifest: Manifest

    @property
    def stage(self) -> str:
        """The stage that made the folder."""
        return self.manifest.identity.stage

    @property
    def has_targets(self) -> bool:
        """Whether the folder holds targets."""
        return self.stage == "build-targets"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stage that made the folder."""
        return self.manifest.settings

    @property
    def size(self) -> int:
        """Its number of examples."""
        return self.manifest.totals["rows"]

    @property
    def shards(self) -> range:
        """The indices of its shards."""
        return range(len(self.manifest.shards))

    @cached_property
    def schema(self) -> Schema:
        """The schema of its shards. Raises UserError for a stage whose folders have none."""
        packing = packing_of(self.settings, self.manifest.frequent_ids)
        return schema_of(self.stage, self.settings["vocab_size"], packing)

    def shard_path(self, shard: int) -> Path:
        """The Arrow file of a shard."""
        return self.path / self.manifest.shards[shard].file

    def records(self, *, verify: bool = True) -> Iterator[Any]:
        """The examples of all shards, in order, one shard at a time."""
        for shard in self.shards:
            for batch in self.batches(shard, verify=verify):
                yield from split(self.schema, batch)

    def batches(self, shard: int, *, verify: bool = True) -> Iterator[FlatBatch]:
        """The record batches of a shard, decoded; `verify` compares its hash first.

        Raises UserError also where the shard's counts differ from the manifest's.
        """
        path, entry = self.shard_path(shard), self.manifest.shards[shard]
        left = {level: getattr(entry, name) for level, name in COUNTED.items()}
        for number, stored in enumerate(self.stored_batches(shard, verify=verify)):
            batch = decode(self.schema, stored, f"{path}, record batch {number}")
            for level, lengths in batch.lengths.items():
                left[level] -= int(lengths.sum())
            left["row"] -= len(batch.ids)
            yield batch
        for level, name in COUNTED.items():
            if left[level]:
                said = getattr(entry, name)
                raise UserError(
                    f"{path}: holds {said - left[level]:,} {name}, the manifest says {said:,}: "
                    f"make {self.path} again"
                )

    def stored_batches(self, shard: int, *, verify: bool = True) -> Iterator[pa.RecordBatch]:
        """The record batches of a shard as they are stored; `verify` compares its hash first."""
        self.check(shard, verify=verify)
        with self._opened(shard) as reader:
            for number in range(reader.num_record_batches):
                yield read_batch(reader, number)

    def rows(
        self, shard: int, wanted: Iterable[tuple[int, NDArray[np.integer]]]
    ) -> Iterator[FlatBatch]:
        """Some rows of some record batches of a shard, decoded; compares no hash.

        `wanted` gives the number of a record batch and the rows of it, for each batch to read.
        """
        what = f"{self.shard_path(shard)}, some rows of record batch"
        with self._opened(shard) as reader:
            for number, rows in wanted:
                batch = read_batch(reader, number)
                if not np.array_equal(rows, np.arange(batch.num_rows)):
                    batch = batch.take(pa.array(rows))
                yield decode(self.schema, batch, f"{what} {number}")

    def ids(self, shard: int) -> list[list[str]]:
        """The ids of a shard's rows, batch by batch; reads nothing else and compares no hash."""
        with self._opened(shard, columns=[0]) as reader:
            batches = range(reader.num_record_batches)
            return [read_batch(reader, number).column("id").to_pylist() for number in batches]

    def check(self, shard: int, *, verify: bool = True) -> None:
        """Raises UserError where a shard is missing, or its hash is not the manifest's."""
        path, sha256 = self.shard_path(shard), self.manifest.shards[shard].sha256
        if not path.is_file():
            raise UserError(
                f"{path}: missing, the manifest names it: restore it, or remove {self.path} and "
                "make it again"
            )
        if verify and sha256_of_file(local_copy(path, sha256)) != sha256:
            raise UserError(
                f"{path}: damaged, its hash is not the manifest's: make {self.path} again"
            )

    @contextmanager
    def _opened(
        self, shard: int, columns: list[int] | None = None
    ) -> Iterator[pa.RecordBatchFileReader]:
        """A reader of a shard, which decompresses nothing before columns and sizes are checked."""
        path = self.shard_path(shard)
        local = local_copy(path, self.manifest.shards[shard].sha256)
        arrow = self.schema.arrow
        wanted = arrow if columns is None else pa.schema(map(arrow.field, columns))
        # buffers are small: threads cost more than they save, and there is a reader for each core
        options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
        try:
            with pa.OSFile(str(local)) as file:
                refuse_bombs(file)
                with pa.ipc.open_file(file, options=options) as reader:
                    if reader.schema != wanted:
                        raise UserError(f"{path}: its columns are not those of this format")
                    yield reader
        except (pa.ArrowException, OSError) as error:
            what = "damaged" if path.exists() else "missing"
            raise UserError(f"{path}: {what}: {one_line(error)}") from error


def read_batch(reader: pa.RecordBatchFileReader, number: int) -> pa.RecordBatch:
    batch = reader.get_batch(number)
    batch.validate(full=True)  # list offsets out of range would crash the process
    return batch


def open_sealed(path: Path, stage: str | None = None) -> SealedFolder:
    """Open a sealed folder; `stage` is the only stage that the caller can use.

    Raises UserError where the folder is not sealed, or another stage made it.
    """
    return SealedFolder(path, read_manifest(path, stage))


def read_scores(folder: str | Path, *, verify: bool = True) -> Iterator[ScoredExample]:
    """The scored examples of a folder made by `qpipe score`, in order, one shard at a time.

    `verify` compares the hash of each shard when it is opened. Raises UserError where the folder is
    not a sealed score folder, or a shard is missing or damaged.
    """
    yield from open_sealed(open_path(folder), "score").records(verify=verify)


def read_targets(folder: str | Path, *, verify: bool = True) -> Iterator[TargetExample]:
    """The target examples of a folder made by `qpipe build-targets`, in order, one shard at a time.

    `verify` compares the hash of each shard when it is opened. Raises UserError where the folder is
    not a sealed target folder, or a shard is missing or damaged.
    """
    yield from open_sealed(open_path(folder), "build-targets").records(verify=verify)
