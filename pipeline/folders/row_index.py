"""The index of a sealed folder: what a stream needs to know of every row before it reads any.

A shard's outline is made with the shard and is stored in its sidecar. Sealing collects the outlines
of all shards in one file, whose hash is in the manifest. A folder without an index, made by an
older version, is outlined by reading its shards.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError, one_line
from ..format.arrow_limits import refuse_bombs
from ..format.batches import FlatBatch
from ..storage.cache import opened_copy
from ..storage.files import HashingFile, atomic_file, sha256_of_file
from .manifest import Manifest

INDEX = "index.arrow"
_FIELDS = {
    "shards": np.uint32,
    "batches": np.uint32,
    "tokens": np.uint32,
    "positions": np.uint32,
    "id_hashes": np.uint64,
}
_IN_WORDS = ("batches", "tokens", "positions")  # columns that a sidecar holds in decimal
_ARROW = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in _FIELDS.items()])
_WRITING = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
_READING = pa.ipc.IpcReadOptions(use_threads=False)  # a record batch has five small buffers
_BATCH_ROWS = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class RowOutline:
    """The rows of consecutive shards, in order, [R]."""

    shards: NDArray[np.uint32]
    batches: NDArray[np.uint32]  # the number of the row's record batch, within the shard
    tokens: NDArray[np.uint32]
    positions: NDArray[np.uint32]  # supervised ones
    id_hashes: NDArray[np.uint64]  # `id_hash` of the row's id

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def blocks(self) -> NDArray[np.int64]:
        """A number for each row that is the same for rows of a record batch, and ascends."""
        return self.shards.astype(np.int64) << 32 | self.batches

    @property
    def places(self) -> NDArray[np.int64]:
        """The place of each row in its record batch."""
        blocks = self.blocks
        return np.arange(len(blocks)) - np.searchsorted(blocks, blocks)

    def is_same(self, other: "RowOutline") -> bool:
        """Whether the other outline states the same rows."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _FIELDS)


def id_hash(row_id: str) -> int:
    """The first eight bytes of the SHA-256 of an id."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8])


def outline_of(shard: int, batches: Iterable[FlatBatch]) -> RowOutline:
    """The outline of a shard with these record batches."""
    return join(
        RowOutline(
            np.full(len(batch.ids), shard, np.uint32),
            np.full(len(batch.ids), number, np.uint32),
            batch.lengths["token"].astype(np.uint32),
            batch.lengths["position"].astype(np.uint32),
            np.array([id_hash(row_id) for row_id in batch.ids], np.uint64),
        )
        for number, batch in enumerate(batches)
    )


def join(outlines: Iterable[RowOutline]) -> RowOutline:
    """Several outlines as one."""
    parts = list(outlines)
    columns: Any = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in _FIELDS.items()
    }
    return RowOutline(**columns)


def outline_as_json(outline: RowOutline) -> dict[str, str]:
    """The outline of a shard as numbers in strings, which take less room in JSON than lists."""
    words = {name: " ".join(map(str, getattr(outline, name).tolist())) for name in _IN_WORDS}
    return words | {"id_hashes": outline.id_hashes.astype(">u8").tobytes().hex()}


def outline_from_json(shard: int, value: Any) -> RowOutline:
    """The outline in the sidecar of a shard. Raises ValueError for anything else."""
    if not isinstance(value, dict) or value.keys() != {*_IN_WORDS, "id_hashes"}:
        raise ValueError("outline is not the outline of a shard")
    if not all(isinstance(each, str) for each in value.values()):
        raise ValueError("outline holds something other than text")
    hashes = np.frombuffer(bytes.fromhex(value["id_hashes"]), ">u8").astype(np.uint64)
    try:
        columns: Any = {name: np.array(value[name].split(), np.uint32) for name in _IN_WORDS}
    except OverflowError as error:
        raise ValueError(f"outline holds a number that is too large ({error})") from error
    if any(len(column) != len(hashes) for column in columns.values()):
        raise ValueError("outline has columns of different lengths")
    return RowOutline(np.full(len(hashes), shard, np.uint32), id_hashes=hashes, **columns)


def write_index(folder: Path, outlines: Iterable[RowOutline]) -> str:
    """Write the index of a folder. Returns its hash."""
    with atomic_file(folder / INDEX) as file:
        hashing = HashingFile(file)
        sink = pa.PythonFile(hashing, "w")
        with pa.ipc.new_file(sink, _ARROW, options=_WRITING) as writer:
            for part in _of_size(outlines, _BATCH_ROWS):
                columns = [pa.array(getattr(part, name)) for name in _FIELDS]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_ARROW))
    return hashing.digest.hexdigest()


def _of_size(outlines: Iterable[RowOutline], rows: int) -> Iterator[RowOutline]:
    """The outlines, joined until they have so many rows."""
    waiting: list[RowOutline] = []
    for outline in outlines:
        waiting.append(outline)
        if sum(map(len, waiting)) >= rows:
            yield join(waiting)
            waiting = []
    yield join(waiting)


def read_index(folder: Path, manifest: Manifest) -> Iterator[RowOutline]:
    """Yield the rows of all shards, those of several shards at a time.

    Raises UserError, possibly after the last rows, if the hash of the index is not that in the
    manifest, or the counts of a shard are not.
    """
    path, way_out = folder / INDEX, f"restore it, or make {folder} again"
    if not path.is_file():
        raise UserError(f"{path}: missing, the manifest names it: {way_out}")
    with opened_copy(path, manifest.index) as local:
        if sha256_of_file(local) != manifest.index:
            raise UserError(f"{path}: damaged, its hash is not the manifest's: {way_out}")
        try:
            yield from _counted(_outlines(local), manifest)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged: {one_line(error)}: {way_out}") from error


def _counted(outlines: Iterator[RowOutline], manifest: Manifest) -> Iterator[RowOutline]:
    """The outlines; raises ArrowInvalid if their counts are not those of the shards."""
    wanted = [(entry.rows, entry.tokens, entry.positions) for entry in manifest.shards]
    left = np.array(wanted, np.int64).reshape(-1, 3)
    last = -1
    for outline in outlines:
        blocks = np.append(last, outline.blocks)
        last = blocks[-1]
        if (np.diff(blocks) < 0).any() or last >> 32 >= len(left):
            raise pa.ArrowInvalid("its rows are not in order")
        for column, values in enumerate((None, outline.tokens, outline.positions)):
            sums = np.bincount(outline.shards, values, len(left))
            left[:, column] -= sums.astype(np.int64)
        yield outline
    if left.any():
        raise pa.ArrowInvalid("its counts are not the manifest's")


def _outlines(local: Path) -> Iterator[RowOutline]:
    with pa.OSFile(str(local)) as file:
        refuse_bombs(file)
        with pa.ipc.open_file(file, options=_READING) as reader:
            if reader.schema != _ARROW:
                raise pa.ArrowInvalid("its columns are not those of an index")
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                yield RowOutline(*(batch.column(name).to_numpy() for name in _FIELDS))
