"""A teacher's score folder joined to the base's, by example and supervised token.

A folder made by `qpipe score --at` has the base's examples in the base's shards and is read in step
with it. Any other is searched by example id (`Join`). The two must hold the same tokens at the same
positions. Behind a context of the teacher's own (`score --context`) only the supervised tokens are
the same.
"""

from collections.abc import Iterator
from itertools import chain, islice, zip_longest

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.folders.join import Join
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import FlatBatch, split
from ...pipeline.format.records import Example


class Teacher:
    """A second model's scores of the base's examples.

    Raises UserError where the folder lacks examples of the base.
    """

    def __init__(self, base: SealedFolder, folder: SealedFolder) -> None:
        self.base = base
        self.folder = folder
        self.folders = (folder,)
        self.schema = folder.schema
        self.has_context = "context" in folder.settings
        self._join = Join(base, folder)
        self.is_in_step = all(map(self._join.is_in_step, base.shards))
        if not self.is_in_step:
            self._refuse_missing()

    def batches(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        """The batches of a shard of the base, each with the teacher's scores of its rows."""
        for batch, own in self._pairs(shard):
            if not self._are_same(batch, own):
                raise self._other_tokens()
            yield batch, own

    def _are_same(self, one: FlatBatch, other: FlatBatch) -> bool:
        """Whether two batches have the same rows of supervised tokens, and of all tokens."""
        if not np.array_equal(one.lengths["position"], other.lengths["position"]):
            return False
        if self.has_context:
            return np.array_equal(one.observed_ids, other.observed_ids)
        return _same_tokens(one, other)

    def _pairs(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        return zip(self.base.batches(shard), self._join.batches(shard), strict=True)

    def _refuse_missing(self) -> None:
        """Refuse a folder in which a search would not find each example once."""
        way_out = f"score the teacher with --at {self.base.path}"
        if self.has_context:
            way_out += ", or leave out what it rejected with `qpipe subset --ids`"
        repeated = self._join.repeated()
        if repeated is not None:
            raise UserError(
                f"{self.folder.path}: holds example {repeated} twice, and its order is not "
                f"that of {self.base.path}: {way_out}"
            )
        missing = self._join.missing()
        if missing:
            raise UserError(
                f"{self.folder.path}: lacks {len(missing):,} of the {self.base.size:,} examples of "
                f"{self.base.path}, the first is {missing[0]}: {way_out}"
            )

    def _other_tokens(self) -> UserError:
        """The error for examples with other tokens; counts them in the whole folder."""
        pairs = chain.from_iterable(map(self._pairs, self.base.shards))
        rows = chain.from_iterable(
            zip(split(self.base.schema, batch), split(self.folder.schema, own), strict=True)
            for batch, own in pairs
        )
        differences = _other_answers if self.has_context else _differences
        first_of_rows = chain.from_iterable(islice(differences(*row), 1) for row in rows)
        first = next(first_of_rows)
        differing = 1 + sum(1 for _ in first_of_rows)
        return UserError(
            f"{self.folder.path}: {differing:,} of {self.base.size:,} examples have other tokens "
            f"than in {self.base.path}, the first: {first}: score the teacher with --at "
            f"{self.base.path}"
        )


def _same_tokens(one: FlatBatch, other: FlatBatch) -> bool:
    """Whether two batches have the same rows of tokens and supervised positions."""
    return all(
        np.array_equal(one.lengths[level], other.lengths[level])
        and np.array_equal(one[name], other[name])
        for name, level in (("input_ids", "token"), ("positions", "position"))
    )


def _other_answers(ours: Example, theirs: Example) -> Iterator[str]:
    """The supervised tokens in which two examples differ, in words."""
    pairs = (each.observed_ids.tolist() for each in (ours, theirs))
    for place, (our, their) in enumerate(zip_longest(*pairs, fillvalue="absent")):
        if our != their:
            yield f"{ours.id}, supervised token {place} is {their}, not {our}"


def _differences(ours: Example, theirs: Example) -> Iterator[str]:
    """The tokens and supervised positions in which two examples differ, in words."""
    for name, word in (("input_ids", "token"), ("positions", "supervised position")):
        pairs = (getattr(each, name).tolist() for each in (ours, theirs))
        for place, (our, their) in enumerate(zip_longest(*pairs, fillvalue="absent")):
            if our != their:
                yield f"{ours.id}, {word} {place} is {their}, not {our}"
