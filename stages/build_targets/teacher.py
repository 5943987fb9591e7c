"""A teacher's score folder joined to the base's, by example and position.

A folder made by `qpipe score --at` has the base's examples in the base's shards and is read in step
with it. Any other is searched by example id (`Join`).
"""

from collections.abc import Iterator
from itertools import chain, zip_longest

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.folders.join import Join
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import FlatBatch


class Teacher:
    """A second model's scores of the base's examples.

    Raises UserError for another tokenizer, and where the folder lacks examples of the base.
    """

    def __init__(self, base: SealedFolder, folder: SealedFolder) -> None:
        self.base = base
        self.folder = folder
        self._join = Join(base, folder)
        _refuse_other_tokenizer(base, folder)
        self.is_in_step = all(map(self._join.is_in_step, base.shards))
        if not self.is_in_step:
            self._refuse_missing()

    def batches(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        """The batches of a shard of the base, each with the teacher's scores of its rows."""
        for batch, own in self._pairs(shard):
            if not _same_tokens(batch, own):
                raise self._other_tokens(batch, own)
            yield batch, own

    def _pairs(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        return zip(self.base.batches(shard), self._join.batches(shard), strict=True)

    def _refuse_missing(self) -> None:
        """Refuse a folder in which a search would not find each example once."""
        repeated = self._join.repeated()
        if repeated is not None:
            raise UserError(
                f"{self.folder.path}: example {repeated} stands there twice, and its order is not "
                f"that of {self.base.path}: score the teacher with --at {self.base.path}"
            )
        missing = self._join.missing()
        if missing:
            raise UserError(
                f"{self.folder.path}: lacks {len(missing):,} of the {self.base.size:,} examples of "
                f"{self.base.path}, the first is {missing[0]}: score the teacher with "
                f"--at {self.base.path}"
            )

    def _other_tokens(self, batch: FlatBatch, own: FlatBatch) -> UserError:
        """The error for an example with other tokens; counts all of them."""
        pairs = chain.from_iterable(map(self._pairs, self.base.shards))
        differing = sum(len(_differing_rows(*pair)) for pair in pairs)
        return UserError(
            f"{self.folder.path}: {differing:,} of {self.base.size:,} examples have other tokens "
            f"than in {self.base.path}, the first: {_first_difference(batch, own)}: score the "
            f"teacher with --at {self.base.path}"
        )


def _refuse_other_tokenizer(base: SealedFolder, folder: SealedFolder) -> None:
    ours, theirs = (each.settings["tokenizer_hash"] for each in (base, folder))
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
