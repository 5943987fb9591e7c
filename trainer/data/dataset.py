"""A target folder as a torch data set with random access."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...pipeline.errors import UserError
from ...pipeline.folders.mixing import parts_of
from ...pipeline.format.records import TargetExample
from ...pipeline.storage.remote import open_path
from .mixture import mix
from .stream import open_streams

CACHED_BLOCKS = 4  # record batches whose examples stay in memory

_FIELDS = tuple(field.name for field in fields(TargetExample))


class TargetDataset(Dataset[dict[str, Any]]):
    """The examples of a target folder that have supervised tokens, as dicts of numpy arrays.

    A dict has the fields of `TargetExample`. A mixture has as many rows as its parts together, in
    the proportions of their weights. Opening reads the index of the folder. Afterwards rows are
    read on demand, by any number of worker processes; those of one batch of a `DataLoader` are read
    together. The hash of a shard is compared before its first row is read, unless `verify` is
    False. A few record batches stay in memory. Raises UserError where the folder is not sealed or
    has no supervised token, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        parts = parts_of(open_path(folder))
        opened = [open_streams(part.folder, 0.0, verify=verify) for part in parts]
        for part, (stream, _) in zip(parts, opened, strict=True):
            if not len(stream):
                raise UserError(f"{part.folder.path}: has no supervised token to train on")
        self._mixture = mix([stream for stream, _ in opened], [part.weight for part in parts])
        self._cached: OrderedDict[tuple[int, int], list[TargetExample]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._place(index)
        starts = self._mixture.streams[part].outline.starts
        block = int(np.searchsorted(starts, row, side="right")) - 1
        if (part, block) not in self._cached:
            rows = np.arange(starts[block], starts[block + 1])
            self._cached[part, block] = list(self._mixture.streams[part].at(rows))
            if len(self._cached) > CACHED_BLOCKS:
                self._cached.popitem(last=False)
        self._cached.move_to_end((part, block))
        return _as_dict(self._cached[part, block][row - int(starts[block])])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = [self._place(index) for index in indices]
        found = [
            stream.at(np.array([row for part, row in places if part == number], np.int64))
            for number, stream in enumerate(self._mixture.streams)
        ]
        return [_as_dict(next(found[part])) for part, _ in places]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the cached examples: each worker process reads its own."""
        return self.__dict__ | {"_cached": OrderedDict()}

    def _place(self, index: int) -> tuple[int, int]:
        """The part that a row comes from, and the row's index in that part."""
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, row = self._mixture.turn(int(number))
        return part, row % len(self._mixture.streams[part])


def _as_dict(example: TargetExample) -> dict[str, Any]:
    return {name: getattr(example, name) for name in _FIELDS}
