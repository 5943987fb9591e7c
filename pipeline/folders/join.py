"""Joining two sealed folders by the ids of their examples."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from ..format.batches import FlatBatch, flatten, split
from .sealed import SealedFolder

Place = tuple[int, int, int]  # shard, record batch, row of the batch


class Join:
    """The rows of `other` for the examples of `main`.

    A shard whose ids have the same order in both folders is read in step. For any other shard, all
    ids of `other` are indexed, which takes some hundred bytes of memory for each example; the more
    similar the two orders, the fewer shards are opened twice.

    Methods raise UserError if a shard is missing or damaged.
    """

    def __init__(self, main: SealedFolder, other: SealedFolder) -> None:
        self.main = main
        self.other = other

    def is_in_step(self, shard: int) -> bool:
        """Whether a shard of `main` has the ids of the same shard of `other`, in the same order."""
        return shard in self.other.shards and self.main.ids(shard) == self.other.ids(shard)

    def batches(self, shard: int) -> Iterator[FlatBatch]:
        """Yield, for each batch of a shard of `main`, the rows of `other`, which must all exist."""
        if self.is_in_step(shard):
            yield from self.other.batches(shard)
        else:
            for found in self._search(shard):
                yield flatten(self.other.schema, found)

    def records(self, shard: int) -> Iterator[list[Any]]:
        """Yield, for each batch of a shard of `main`, the examples of `other`, None if missing.

        Of several examples with the same id, a search finds the first.
        """
        if self.is_in_step(shard):
            for batch in self.other.batches(shard):
                yield list(split(self.other.schema, batch))
        else:
            yield from self._search(shard)

    def missing(self) -> list[str]:
        """The ids of `main` that `other` lacks."""
        return [
            row_id
            for shard in self.main.shards
            if not self.is_in_step(shard)
            for row_id in chain.from_iterable(self.main.ids(shard))
            if row_id not in self._places
        ]

    def repeated(self) -> str | None:
        """The first id that `other` has twice, or None."""
        seen = self._places
        return next((row_id for row_id, place in self._placed() if seen[row_id] != place), None)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The first place of each id of `other`."""
        places: dict[str, Place] = {}
        for row_id, place in self._placed():
            places.setdefault(row_id, place)
        return places

    def _placed(self) -> Iterator[tuple[str, Place]]:
        """The id and the place of each example of `other`."""
        for shard in self.other.shards:
            for number, ids in enumerate(self.other.ids(shard)):
                for row, row_id in enumerate(ids):
                    yield row_id, (shard, number, row)

    def _search(self, shard: int) -> Iterator[list[Any]]:
        places = [[self._places.get(row_id) for row_id in ids] for ids in self.main.ids(shard)]
        wanted = [sorted({place for place in of_batch if place}) for of_batch in places]
        records = self._read(chain.from_iterable(wanted))
        for of_batch, ascending in zip(places, wanted, strict=True):
            found: dict[Place | None, Any] = {place: next(records) for place in ascending}
            yield [found.get(place) for place in of_batch]

    def _read(self, places: Iterable[Place]) -> Iterator[Any]:
        """The examples at some places; neighbours in a shard, or in a batch, are read together."""
        for shard, of_shard in groupby(places, itemgetter(0)):
            self.other.check_once(shard)
            wanted = (
                (number, np.array([row for *_, row in of_batch]))
                for number, of_batch in groupby(of_shard, itemgetter(1))
            )
            for batch in self.other.rows(shard, wanted):
                yield from split(self.other.schema, batch)
