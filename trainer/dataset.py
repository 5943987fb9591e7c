"""A target folder as a torch data set of rows in any order, a few record batches in memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..pipeline.manifest import read_manifest
from ..pipeline.records import TargetExample
from .stream import open_streams

CACHED_BLOCKS = 4  # record batches whose examples are kept

_FIELDS = tuple(field.name for field in fields(TargetExample))


class TargetDataset(Dataset[dict[str, Any]]):
    """The examples of a target folder that have supervised tokens, as dicts of numpy arrays.

    A dict has the fields of `TargetExample`. Opening reads the folder once, to check every shard's
    hash and to learn where each row is; after that rows are read when asked for, by any number of
    worker processes. Rows that are asked for together, as a `DataLoader` does, are read together.
    Raises UserError where the folder is not sealed, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        manifest = read_manifest(Path(folder), "build-targets")
        self.stream, _ = open_streams(Path(folder), manifest, 0.0)
        self._cached: OrderedDict[int, list[TargetExample]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        starts = self.stream.outline.starts
        block = int(np.searchsorted(starts, row, side="right")) - 1
        if block not in self._cached:
            rows = np.arange(starts[block], starts[block + 1])
            self._cached[block] = list(self.stream.at(rows))
            if len(self._cached) > CACHED_BLOCKS:
                self._cached.popitem(last=False)
        self._cached.move_to_end(block)
        return _as_dict(self._cached[block][row - int(starts[block])])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = np.array([self._row(index) for index in indices], np.int64)
        return [_as_dict(example) for example in self.stream.at(rows)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the examples: a worker process reads its own."""
        return self.__dict__ | {"_cached": OrderedDict()}

    def _row(self, index: int) -> int:
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return int(row)


def _as_dict(example: TargetExample) -> dict[str, Any]:
    return {name: getattr(example, name) for name in _FIELDS}
