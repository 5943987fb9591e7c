"""Reads a sealed folder: its manifest and the rows of its shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from ..format.schema import Column, Schema, packing_of, schema_of
from ..storage.cache import opened_copy
from ..storage.files import refuse_irregular, sha256_of_file
from ..storage.remote import is_remote, open_path
from .manifest import Manifest, read_manifest
from .row_index import RowOutline, outline_of, read_index
from .shards import COUNTED, refuse_incomplete

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class SealedFolder:
    """A sealed folder: its path and its manifest.

    Methods take the index of a shard. They raise UserError if the shard is missing or damaged.
    """

    path: Path
    manifest: Manifest
    checked: set[int] = field(default_factory=set, compare=False)  # shards whose hash was compared

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
        """The number of examples."""
        return self.manifest.totals["rows"]

    @property
    def shards(self) -> range:
        """The indices of the shards."""
        return range(len(self.manifest.shards))

    @cached_property
    def schema(self) -> Schema:
        """The schema of the shards. Raises UserError for a stage that makes no shards."""
        packing = packing_of(self.stage, self.settings, self.manifest.frequent_ids)
        return schema_of(self.stage, self.settings["vocab_size"], packing)

    def shard_path(self, shard: int) -> Path:
        """The Arrow file of a shard."""
        return self.path / self.manifest.shards[shard].file

    def records(self, *, verify: bool = True) -> Iterator[Any]:
        """Yield the examples of all shards in order; one shard is in memory at a time."""
        for shard in self.shards:
            for batch in self.batches(shard, verify=verify):
                yield from split(self.schema, batch)

    def batches(self, shard: int, *, verify: bool = True) -> Iterator[FlatBatch]:
        """Yield the decoded record batches of a shard; `verify` compares its hash first.

        Raises UserError also if the shard's counts differ from the manifest's.
        """
        path, entry = self.shard_path(shard), self.manifest.shards[shard]
        left = {level: getattr(entry, name) for level, name in COUNTED.items()}

        def refuse(wrong: Callable[[int], bool]) -> None:
            for level, name in COUNTED.items():
                if wrong(left[level]):
                    expected = getattr(entry, name)
                    raise UserError(
                        f"{path}: holds {expected - left[level]:,} {name}, its manifest states "
                        f"{expected:,}: make {self.path} again"
                    )

        for number, stored in enumerate(self.stored_batches(shard, verify=verify)):
            batch = decode(self.schema, stored, f"{path}, record batch {number}")
            for level, lengths in batch.lengths.items():
                left[level] -= int(lengths.sum())
            left["row"] -= len(batch.ids)
            refuse(lambda count: count < 0)  # now: there may be any number of batches
            yield batch
        refuse(bool)

    def stored_batches(self, shard: int, *, verify: bool = True) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a shard as stored; `verify` compares its hash first."""
        self.check(shard, verify=verify)
        with self._opened(shard) as reader:
            for number in range(reader.num_record_batches):
                yield read_batch(reader, number)

    def rows(
        self, shard: int, wanted: Iterable[tuple[int, NDArray[np.integer]]]
    ) -> Iterator[FlatBatch]:
        """Yield some rows of a shard, decoded; does not compare the hash.

        `wanted` gives, for each record batch to read, its number and the rows.
        """
        what = f"{self.shard_path(shard)}, some rows of record batch"
        with self._opened(shard) as reader:
            for number, rows in wanted:
                batch = read_batch(reader, number)
                if not np.array_equal(rows, np.arange(batch.num_rows)):
                    batch = batch.take(pa.array(rows))
                yield decode(self.schema, batch, f"{what} {number}")

    def ids(self, shard: int) -> list[list[str]]:
        """The ids of a shard's rows, by batch; does not compare the hash."""
        with self._opened(shard, columns=[0]) as reader:
            batches = range(reader.num_record_batches)
            return [read_batch(reader, number).column("id").to_pylist() for number in batches]

    def outlines(self, *, verify: bool = True) -> Iterator[RowOutline]:
        """Yield the outlines of all rows, from the index if there is one, else from the shards.

        With the index a shard is not read, and is not verified before it is (`check_once`).
        """
        if not self.manifest.index:
            for shard in self.shards:
                yield outline_of(shard, self.batches(shard, verify=verify))
            return
        if not is_remote(self.path):
            way_out = f"restore it, or make {self.path} again"
            refuse_incomplete(self.path, self.manifest.shards, f"the manifest names it: {way_out}")
        yield from read_index(self.path, self.manifest)

    def check_once(self, shard: int) -> None:
        """Do the same as `check`, unless this object has compared the hash of the shard before."""
        if shard not in self.checked:
            self.check(shard)

    def check(self, shard: int, *, verify: bool = True) -> None:
        """Raise UserError if a shard is missing, or its hash is not the manifest's."""
        path, sha256 = self.shard_path(shard), self.manifest.shards[shard].sha256
        if not verify:
            self._refuse_missing(path)
            return
        try:
            with opened_copy(path, sha256) as local:
                found = sha256_of_file(local)
        except (OSError, UserError):
            self._refuse_missing(path)  # not before: a bucket takes a request for it
            raise
        if found != sha256:
            raise UserError(
                f"{path}: damaged, its hash is not the manifest's: make {self.path} again"
            )
        self.checked.add(shard)

    def _refuse_missing(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"{path}: missing, the manifest names it: restore it, or remove {self.path} and "
                "make it again"
            )

    @contextmanager
    def _opened(
        self, shard: int, columns: list[int] | None = None
    ) -> Iterator[pa.RecordBatchFileReader]:
        """Open a shard; columns and sizes are checked before anything is decompressed."""
        path = self.shard_path(shard)
        arrow = self.schema.arrow
        wanted = arrow if columns is None else pa.schema(map(arrow.field, columns))
        # buffers are small, and there is a reader for each core: threads would not save time
        options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
        try:
            with opened_copy(path, self.manifest.shards[shard].sha256) as local:
                refuse_irregular(local)
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
    """Read and validate a record batch."""
    batch = reader.get_batch(number)
    batch.validate(full=True)  # list offsets out of range would crash the process
    return batch


def open_sealed(path: Path, stage: str | None = None) -> SealedFolder:
    """Open a sealed folder; `stage` is the only stage that the caller accepts.

    Raises UserError if the folder is not sealed, or was made by another stage.
    """
    return SealedFolder(path, read_manifest(path, stage))


def read_scores(folder: str | Path, *, verify: bool = True) -> Iterator[ScoredExample]:
    """Yield the scored examples of a folder made by `qpipe score`, one shard at a time.

    `verify` compares the hash of each shard when it is opened. Raises UserError if the folder is
    not a sealed score folder, or a shard is missing or damaged.
    """
    yield from open_sealed(open_path(folder), "score").records(verify=verify)


def read_targets(folder: str | Path, *, verify: bool = True) -> Iterator[TargetExample]:
    """Yield the target examples of a folder made by `qpipe build-targets`, one shard at a time.

    `verify` compares the hash of each shard when it is opened. Raises UserError if the folder is
    not a sealed target folder, or a shard is missing or damaged.
    """
    yield from open_sealed(open_path(folder), "build-targets").records(verify=verify)


def decoder(folder: str | Path) -> Callable[[Mapping[str, Any]], Columns]:
    """Return a function that decodes rows of a folder's shards, given as columns of lists.

    For tools that read the shards themselves, such as `datasets`. The decoded columns of targets
    are id, input_ids (T numbers a row), positions, trust, weights, tail_mass (N numbers a row),
    support_ids and support_probs (N lists a row); those of scores are the fields of
    `ScoredExample`, with N lists a row for topk_ids and topk_log_probs. T counts the tokens of a
    row, N its supervised positions. Columns that the folder does not have are left out.

    Raises UserError if the folder is not sealed; the function, if the rows are from another folder.
    """
    return partial(_decoded, open_sealed(open_path(folder)).schema, f"decoder of {folder}")


def _decoded(schema: Schema, where: str, rows: Mapping[str, Any]) -> Columns:
    arrow = schema.arrow
    missing = [name for name in arrow.names if name not in rows]
    if missing:
        raise UserError(
            f"{where}: the rows lack column {missing[0]}: give all columns of a shard, before any "
            "of them is removed"
        )
    try:
        arrays = [pa.array(rows[field.name], field.type) for field in arrow]
        stored = pa.RecordBatch.from_arrays(arrays, schema=arrow)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"{where}: the rows are not from this folder: {error}") from error
    batch = decode(schema, stored, where)
    lists = {column.name: _lists(batch, column) for column in schema.lists}
    del lists["counts"]
    return {"id": batch.ids} | lists


def _lists(batch: FlatBatch, column: Column) -> list[Any]:
    """A column as a list for each row; entries as a list for each position of a row."""
    values, level = pa.array(batch[column.name]), column.level
    if level == "entry":
        values, level = pa.ListArray.from_arrays(_ends(batch["counts"]), values), "position"
    return pa.ListArray.from_arrays(_ends(batch.lengths[level]), values).to_pylist()


def _ends(lengths: NDArray[np.integer]) -> pa.Array:
    return pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
