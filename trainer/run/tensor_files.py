"""The tensors of a checkpoint: one safetensors file for each process, hashed as it is written.

Files of torch's own storage hold pickles, which run code when they are read. `torch.distributed`
still plans which process writes and reads which part of a sharded tensor. A part has the name of
its tensor and, unless it starts at the origin, its offsets: `model.head.weight@64.0`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

OWN = "process/"  # starts the names of tensors that belong to one process
_AT = "@"
MOST_HEADER = 1 << 25  # bytes, enough for 200,000 tensors; parsed, it takes twenty times that
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def file_name(process: int) -> str:
    """The file of a process."""
    return f"process-{process}.safetensors"


class TensorWriter(StorageWriter):
    """Writes the tensors of this process into a folder, with some of its `own`.

    On the main process `sha256` holds the hash of every file, once all are written.
    """

    def __init__(self, folder: Path, process: int, own: Mapping[str, Tensor]) -> None:
        self.path = folder / file_name(process)
        self.own = own
        self.sha256: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of the plan."""
        tensors = {_part_name(item.index): planner.resolve_data(item) for item in plan.items}
        tensors |= {OWN + name: value for name, value in self.own.items()}
        entry = self.path.name, write_tensors(self.path, tensors)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(OWN), 0, entry)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the hashes."""
        self.sha256 = dict(each.storage_data for of_process in results for each in of_process)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class TensorReader(StorageReader):
    """Reads tensors from the files of all processes, each at most once."""

    def __init__(self, paths: list[Path]) -> None:
        self.metadata = Metadata({}, storage_data={})
        for path in paths:
            _add_parts(path, self.metadata)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The parts in the files."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts of the plan into the tensors of this process."""
        places = self.metadata.storage_data
        for path in sorted({places[item.storage_index][0] for item in plan.items}):
            with safe_open(path, "pt") as file:
                for item in plan.items:
                    source, name = places[item.storage_index]
                    if source != path:
                        continue
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    part = tuple(slice(start, start + length) for start, length in ends)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_slice(name)[part] if part else file.get_tensor(name))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def own_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that the process which wrote a file has for itself."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(OWN)]  # noqa: SIM118
        return {name.removeprefix(OWN): file.get_tensor(name) for name in names}


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> str:
    """Write a safetensors file, one tensor in host memory at a time. Returns its SHA-256."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    _refuse_long(len(text))
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        hashing = _Hashing(file, pool)
        hashing.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            hashing.write(_bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())
    return hashing.digest.hexdigest()


class _Hashing:
    """Writes to a file and hashes at the same time, on another thread."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self.file, self.pool = file, pool
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> None:
        hashed = self.pool.submit(self.digest.update, content)
        self.file.write(content)
        hashed.result()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _part_name(index: MetadataIndex) -> str:
    offsets = index.offset or ()
    return index.fqn + (_AT + ".".join(map(str, offsets)) if any(offsets) else "")


def _refuse_long(header: int) -> None:
    if header > MOST_HEADER:
        raise ValueError(f"its header has {header:,} bytes, more than {MOST_HEADER:,}")


def _add_parts(path: Path, metadata: Metadata) -> None:
    """Add the parts in a file; raises ValueError, KeyError or SafetensorError if it is damaged."""
    with path.open("rb") as file:
        _refuse_long(int.from_bytes(file.read(8), "little"))
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(OWN):
                continue
            stored = file.get_slice(name)
            sizes = torch.Size(stored.get_shape())
            fqn, _, place = name.partition(_AT)
            offsets = torch.Size(map(int, place.split(".")) if place else [0] * len(sizes))
            ends = torch.Size(map(sum, zip(offsets, sizes, strict=True)))
            found = metadata.state_dict_metadata.setdefault(
                fqn,
                TensorStorageMetadata(TensorProperties(_DTYPES[stored.get_dtype()]), ends, []),
            )
            assert isinstance(found, TensorStorageMetadata)
            found.chunks.append(ChunkStorageMetadata(offsets, sizes))
            whole = torch.Size(map(max, zip(found.size, ends, strict=True)))
            metadata.state_dict_metadata[fqn] = replace(found, size=whole)
            metadata.storage_data[MetadataIndex(fqn, offsets)] = str(path), name
