"""Joining a teacher's score folder to the base's, by example and position.

A folder made by `qpipe score --at` has the base's examples in the base's shards: the two are read
side by side. Any other is searched by the examples' ids, which takes some hundred bytes of memory
an example, and is quick where its order is much like the base's.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import zip_longest

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import folder_schema
from ...pipeline.format.batches import FlatBatch, flatten, split
from ...pipeline.format.records import ScoredExample
from .score_folder import ScoreFolder


class Teacher:
    """A second model's scores of the base's examples.

    Raises UserError for another tokenizer, and where examples of the base are missing.
    """

    def __init__(self, base: ScoreFolder, folder: ScoreFolder) -> None:
        self.base = base
        self.folder = folder
        _refuse_other_tokenizer(base, folder)
        pairs = zip_longest(base.ids(), folder.ids())
        self.is_in_step = all(ids == own for ids, own in pairs)
        if not self.is_in_step:
            self._refuse_missing()
        self._loaded_shard = -1
        self._loaded: list[ScoredExample] = []

    def join(
        self, index: int, batches: Iterable[FlatBatch]
    ) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        """The batches of the base's shard `index`, each with the teacher's scores of its rows."""
        if self.is_in_step:
            pairs = zip(batches, self.folder.batches(index), strict=True)
        else:
            pairs = ((batch, self._find(batch.ids)) for batch in batches)
        for batch, own in pairs:
            if not _same_tokens(batch, own):
                raise self._other_tokens(batch, own)
            yield batch, own

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """The shard and row of each example."""
        places: dict[str, tuple[int, int]] = {}
        for shard, batches in enumerate(self.folder.ids()):
            rows = [row_id for batch in batches for row_id in batch]
            for row, row_id in enumerate(rows):
                if places.setdefault(row_id, (shard, row)) != (shard, row):
                    raise UserError(
                        f"{self.folder.path}: example {row_id} stands there twice, and its order "
                        f"is not that of {self.base.path}: score the teacher with "
                        f"--at {self.base.path}"
                    )
        return places

    def _find(self, ids: list[str]) -> FlatBatch:
        schema = folder_schema(self.folder.manifest)
        return flatten(schema, [self._row(*self._places[row_id]) for row_id in ids])

    def _row(self, shard: int, row: int) -> ScoredExample:
        if shard != self._loaded_shard:
            schema = folder_schema(self.folder.manifest)
            batches = self.folder.batches(shard)
            self._loaded = [example for batch in batches for example in split(schema, batch)]
            self._loaded_shard = shard
        return self._loaded[row]

    def _refuse_missing(self) -> None:
        wanted = (row_id for shard in self.base.ids() for batch in shard for row_id in batch)
        missing = [row_id for row_id in wanted if row_id not in self._places]
        if missing:
            raise UserError(
                f"{self.folder.path}: lacks {len(missing):,} of the "
                f"{self.base.manifest.totals['rows']:,} examples of {self.base.path}, the first is "
                f"{missing[0]}: score the teacher with --at {self.base.path}"
            )

    def _other_tokens(self, batch: FlatBatch, own: FlatBatch) -> UserError:
        """What to say of an example that is tokenised otherwise; counts all of them."""
        differing = 0
        for index in range(len(self.base.manifest.shards)):
            batches = self.base.batches(index)
            if self.is_in_step:
                pairs = zip(batches, self.folder.batches(index), strict=True)
            else:
                pairs = ((each, self._find(each.ids)) for each in batches)
            for each, other in pairs:
                differing += len(_differing_rows(each, other))
        return UserError(
            f"{self.folder.path}: {differing:,} of {self.base.manifest.totals['rows']:,} examples "
            f"have other tokens than in {self.base.path}, the first: "
            f"{_first_difference(batch, own)}: score the teacher with --at {self.base.path}"
        )


def _refuse_other_tokenizer(base: ScoreFolder, folder: ScoreFolder) -> None:
    ours, theirs = (each.manifest.settings["tokenizer_hash"] for each in (base, folder))
    if ours != theirs:
        raise UserError(
            f"{folder.path}: made with tokenizer {theirs[:12]}…, {base.path} with {ours[:12]}…: "
            "a teacher must have the base's tokenizer"
        )


def _same_tokens(one: FlatBatch, other: FlatBatch) -> bool:
    """Whether two batches have the same rows of tokens and supervised positions."""
    return all(
        np.array_equal(one.lengths[level], other.lengths[level])
        and np.array_equal(one[name], other[name])
        for name, level in (("input_ids", "token"), ("positions", "position"))
    )


def _rows(batch: FlatBatch, name: str, level: str) -> list[np.ndarray]:
    return np.split(batch[name], np.cumsum(batch.lengths[level])[:-1])


def _differing_rows(one: FlatBatch, other: FlatBatch) -> list[int]:
    """The rows that have other tokens or supervised positions."""
    columns = (("input_ids", "token"), ("positions", "position"))
    parts = [
        list(zip(_rows(one, *column), _rows(other, *column), strict=True)) for column in columns
    ]
    return [
        row
        for row in range(len(one.ids))
        if not all(np.array_equal(*pairs[row]) for pairs in parts)
    ]


def _first_difference(one: FlatBatch, other: FlatBatch) -> str:
    """The first token or position of the first row in which two batches differ, in words."""
    row = _differing_rows(one, other)[0]
    for name, level, word in (
        ("input_ids", "token", "token"),
        ("positions", "position", "supervised position"),
    ):
        ours, theirs = (_rows(each, name, level)[row].tolist() for each in (one, other))
        for place, (our, their) in enumerate(zip_longest(ours, theirs, fillvalue="absent")):
            if our != their:
                return f"{one.ids[row]}, {word} {place} is {their}, not {our}"
    raise AssertionError("the rows are the same")
