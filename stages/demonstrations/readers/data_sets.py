"""Readers of data sets of the `datasets` library, in a folder and on the hub."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ....pipeline.errors import UserError, one_line
from ....pipeline.storage.files import sha256_of_file
from .reader import Lines, Reader, without_nones

if TYPE_CHECKING:
    import datasets


def folder_reader(path: Path, config: str | None, split: str) -> Reader:
    """Read a data set of files in a folder, or one saved there by `datasets`."""
    return _data_set_reader(
        lambda: _load_folder(path, config, split),
        lambda: _digest(config, split, *_file_digests(path)),
    )


def hub_reader(name: str, config: str | None, split: str) -> Reader:
    """Stream a data set from the hub."""

    @cache
    def load() -> "tuple[datasets.IterableDataset, str | None]":
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(name, config)
            return builder.as_streaming_dataset(split), builder.hash  # pyright: ignore[reportReturnType]
        except Exception as error:  # of the hub, the network or the data set
            raise UserError(
                f"demonstrations {name}: no such file, and no data set that can be loaded "
                f"(NAME[:CONFIG][@SPLIT]): {one_line(error)}"
            ) from error

    return _data_set_reader(lambda: load()[0], lambda: _digest(name, config, split, load()[1]))


def _data_set_reader(
    load: "Callable[[], datasets.Dataset | datasets.IterableDataset]",
    fingerprint: Callable[[], str],
) -> Reader:
    def rows(start: int) -> Lines:
        yield from enumerate(map(without_nones, load().skip(start)), start + 1)

    return Reader(rows, lambda: (fingerprint(), _data_set_size(load())))


def _load_folder(
    path: Path, config: str | None, split: str
) -> "datasets.Dataset | datasets.IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return load_dataset(str(path), config, split=split, streaming=True)
    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(
            f"demonstrations {path}: no split {split!r}, there are {', '.join(map(str, saved))}: "
            f"name one as {path}@SPLIT"
        )
    return saved[split]


def _data_set_size(data_set: "datasets.Dataset | datasets.IterableDataset") -> int | None:
    from datasets import Dataset

    return len(data_set) if isinstance(data_set, Dataset) else None


def _file_digests(folder: Path) -> Iterator[str]:
    """Name and content hash of each file in a folder except hidden ones."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not any(part.startswith(".") for part in name.parts):
            yield from (name.as_posix(), sha256_of_file(folder / name))


def _digest(*parts: str | None) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()
