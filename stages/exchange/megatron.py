"""The log-probabilities that Megatron-LM's teacher runs save, read from their tar files.

A tar `dp{D}__{I}.tar` holds `_meta.json` and, for each iteration of data-parallel rank D, a member
`{iteration}.pt.zst`: `values` [sequence, samples, K] of the teacher's log-probabilities, and their
ids as `indices_low` (16 bits) and `bit_17`. Row r of a sequence is about the token after it. Beyond
the nucleus of a token, if the run had one, values are -1e3 or below. Samples are dealt out to the
ranks in micro-batches. The tars do not hold the tokens.

Read as of format version 2 at commit 10cc4f5 of Megatron-LM.
"""

import io
import pickletools
import re
import tarfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Meta
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line
from ...pipeline.storage.files import sha256_of_file
from ..demonstrations.demonstration import UnusableError
from .topk_rows import TopK

META = "_meta.json"
FORMAT_VERSION = 2
MOST_BYTES = 1 << 30  # of a payload; 64 samples of 8,192 tokens with 100 entries take 0.3 GB
MOST_HELD = 1 << 32  # of all payloads in memory: those of the ranks of an iteration
_MOST_META = 1 << 20
# What the pickle of tensors names; torch itself allows more, such as bytearray(n).
_NAMED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v[23]|torch(\.storage)? \w*Storage"
    r"|torch u?int\d+"
)
ABSENT = -900.0  # values below are not of the nucleus
_TAR = re.compile(r"^(?:cp0_)?dp(\d+)__(\d+)\.tar$")
_MEMBER = re.compile(r"^(\d+)\.pt\.zst$")
_Positive = Annotated[int, Meta(ge=1)]


class Saver(msgspec.Struct, frozen=True):
    """How a teacher run dealt out its samples, from `_meta.json`."""

    k: _Positive
    mbs_save: _Positive
    dp_size_save: _Positive
    gbs_save: _Positive
    p: float | None = None
    min_k: _Positive = 1

    def place(self, sample: int) -> tuple[int, int, int]:
        """The iteration, the rank and the column of a sample, all from 0."""
        iteration, within = divmod(sample, self.gbs_save)
        batch, rest = divmod(within, self.mbs_save)
        column = batch // self.dp_size_save * self.mbs_save + rest
        return iteration, batch % self.dp_size_save, column


class _Meta(msgspec.Struct):
    saver: dict[str, Any]


class _Layout(msgspec.Struct):
    format_version: int


class _Member(NamedTuple):
    path: Path
    offset: int
    size: int


class _Payload(NamedTuple):
    """The tensors of a member, [sequence, samples, K] each."""

    values: Any
    low: Any  # the low 16 bits of the ids
    high: Any

    def column(self, place: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The values and ids of a sample, [sequence, K] each."""
        values, low, high = (each[:, place] for each in self)
        ids = low.to(_torch().int64) | high.to(_torch().int64) << 16
        return values.double().numpy(), ids.numpy()

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(each.numel() * each.element_size() for each in self)


@dataclass
class Tars:
    """The tars of a folder. Raises UserError where they cannot be read."""

    folder: Path
    saver: Saver = field(init=False)
    _members: dict[tuple[int, int], _Member] = field(default_factory=dict)
    _read: dict[tuple[int, int], _Payload] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = sorted(each for each in self.folder.glob("*.tar") if _TAR.match(each.name))
        if not self.paths:
            _refuse_later_layout(self.folder)
            raise UserError(f"{self.folder}: holds no tar of Megatron-LM's logits (dp0__….tar)")
        savers = set(map(self._opened, self.paths))
        if len(savers) > 1:
            raise UserError(f"{self.folder}: its tars are of several runs: give those of one")
        (self.saver,) = savers

    @property
    def certain(self) -> int:
        """The number of entries that every position has."""
        return self.saver.k if self.saver.p is None else self.saver.min_k

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each tar."""
        return {path.name: sha256_of_file(path) for path in self.paths}

    def entries(self, sample: int) -> TopK:
        """The entries of a sample, counted from 0. Raises UnusableError where there are none."""
        iteration, rank, column = self.saver.place(sample)
        payload = self._iteration(iteration, rank)
        if column >= payload.values.shape[1]:
            raise UnusableError(f"iteration {iteration} of rank {rank} has no sample {column}")
        values, ids = payload.column(column)
        is_entry = values > ABSENT
        return TopK(is_entry.sum(1), ids[is_entry], values[is_entry])

    def _iteration(self, iteration: int, rank: int) -> _Payload:
        if (iteration, rank) not in self._read:
            member = self._members.get((iteration, rank))
            if member is None:
                raise UnusableError(f"no tar holds iteration {iteration} of rank {rank}")
            self._read = {key: each for key, each in self._read.items() if key[0] == iteration}
            while sum(each.size for each in self._read.values()) > MOST_HELD:
                del self._read[next(iter(self._read))]
            self._read[iteration, rank] = _decoded(member)
        return self._read[iteration, rank]

    def _opened(self, path: Path) -> Saver:
        """The settings of a tar, whose members are noted."""
        try:
            with tarfile.open(path, "r:") as tar:
                return self._noted(path, tar)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a tar of Megatron-LM: {one_line(error)}") from error

    def _noted(self, path: Path, tar: tarfile.TarFile) -> Saver:
        found, name = None, _TAR.match(path.name)
        assert name is not None
        for info in tar:
            if info.name == META and (content := tar.extractfile(info)) is not None:
                found = _saver(path, content.read(_MOST_META))
            elif match := _MEMBER.match(info.name):
                key = int(match[1]), int(name[1])
                self._members[key] = _Member(path, info.offset_data, info.size)
        if found is None:
            raise ValueError(f"it has no {META}")
        return found


def _saver(path: Path, meta: bytes) -> Saver:
    """The settings in `_meta.json`. Raises UserError for another format version."""
    saver = msgspec.json.decode(meta, type=_Meta).saver
    _check_version(path, saver.get("format_version", "1 or earlier"))
    return msgspec.convert(saver, Saver)


def _refuse_later_layout(folder: Path) -> None:
    """Raise UserError if a JSON file beside the data states the version, as from 3 on."""
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            layout = msgspec.json.decode(path.read_bytes(), type=_Layout)
            _check_version(path, layout.format_version)


def _check_version(path: Path, version: int | str) -> None:
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: is of format version {version} of Megatron-LM's log-probabilities, only "
            f"version {FORMAT_VERSION} is read: save them again with Megatron-LM at commit 10cc4f5"
        )


def _decoded(member: _Member) -> _Payload:
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            packed = file.read(member.size)
        return _loaded(packed)
    except Exception as error:  # damaged files raise errors of several libraries
        raise UserError(f"{member.path}: damaged: {one_line(error)}") from error


def _loaded(packed: bytes) -> _Payload:
    """The tensors of a payload. Raises ValueError where they would take more than MOST_BYTES."""
    plain = pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read(MOST_BYTES + 1)
    _refuse_large(len(plain))
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        _refuse_large(sum(info.file_size for info in archive.infolist()))
        for info in archive.infolist():
            if info.filename.endswith("data.pkl"):
                _refuse_others(archive.read(info))
    tensors: dict[str, Any] = _torch().load(io.BytesIO(plain), weights_only=True)
    payload = _Payload(*(tensors[name] for name in ("values", "indices_low", "bit_17")))
    if payload.values.ndim != 3 or len({each.shape for each in payload}) > 1:
        raise ValueError("its values and ids differ in shape")
    _refuse_large(payload.size)  # strides of 0 make one number many
    return payload


def _refuse_large(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"an iteration takes more than {MOST_BYTES:,} bytes")


def _refuse_others(content: bytes) -> None:
    """Raise ValueError for a pickle of anything but tensors in dicts."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "GLOBAL" and not _NAMED.fullmatch(str(argument)):
            raise ValueError(f"it holds {argument}")
        if operation.name in ("STACK_GLOBAL", "INST"):
            raise ValueError("it holds more than tensors")


def _torch() -> Any:
    """Torch, imported when it is first used."""
    import torch

    return torch
