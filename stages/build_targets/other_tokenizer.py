"""A teacher with another tokenizer, joined to the base by example and supervised text.

Such a teacher has scored the same demonstrations as its own tokens, behind its own chat template.
Its distributions are carried over where both have the same token after the same text (`alignment`,
`pipeline/targets/translation`). An example that it lacks or that has another supervised text is
not mapped, and is counted.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.join import Join
from ...pipeline.folders.provenance import tokenizer_hash
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import FlatBatch, flatten, split
from ...pipeline.format.records import ScoredExample
from ...pipeline.targets.translation import (
    MAPPED,
    MISSING,
    NOT_ALIGNED,
    OTHER_TEXT,
    translated,
    translated_schema,
)
from ..looking.vocabulary import Vocabulary, load_tokenizer, matching_ids, vocabulary_of
from .alignment import common_places, written_of


class OtherTokenizer:
    """A teacher's scores of the base's demonstrations, in the base's vocabulary.

    Raises UserError where an example stands twice in the folder, and its order is another one.
    """

    def __init__(
        self, base: SealedFolder, folder: SealedFolder, ours: Vocabulary, theirs: Vocabulary
    ) -> None:
        self.base = base
        self.folder = folder
        self.folders = (folder,)
        self.schema = translated_schema(base.settings["vocab_size"])
        self._vocabularies = ours, theirs
        self._written = written_of(ours), written_of(theirs)
        self._join = Join(base, folder)
        if not all(map(self._join.is_in_step, base.shards)):
            repeated = self._join.repeated()
            if repeated is not None:
                raise UserError(
                    f"{folder.path}: holds example {repeated} twice, and its order is not that of "
                    f"{base.path}: score the same demonstrations with both models"
                )

    def batches(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        """The batches of a shard of the base, each with the teacher's scores in its vocabulary."""
        found = zip(self.base.batches(shard), self._join.records(shard), strict=True)
        for batch, records in found:
            yield batch, self._translated(batch, records)

    def _translated(self, batch: FlatBatch, records: Sequence[ScoredExample | None]) -> FlatBatch:
        theirs = flatten(self.folder.schema, [each for each in records if each is not None])
        places: list[NDArray[np.int64]] = []
        mapping: list[NDArray[np.int32]] = []
        start = 0  # of an example's positions in `theirs`
        for ours, record in zip(split(self.base.schema, batch), records, strict=True):
            place_N, why = self._places(ours, record)
            places.append(np.where(place_N >= 0, place_N + start, -1))
            mapping.append(np.where(place_N >= 0, MAPPED, why).astype(np.int32))
            start += 0 if record is None else len(record.positions)
        return translated(
            batch, theirs, np.concatenate(places), np.concatenate(mapping), self._our_ids
        )

    def _places(
        self, ours: ScoredExample, theirs: ScoredExample | None
    ) -> tuple[NDArray[np.int64], int]:
        """The teacher's position for each of ours, or −1; and why there is none."""
        none = np.full(len(ours.positions), -1, np.int64)
        if theirs is None:
            return none, MISSING
        places = common_places(ours, theirs, self._written)
        if places is None:
            return none, OTHER_TEXT
        place_N = np.array(places, np.int64)
        found = np.flatnonzero(place_N >= 0)
        their_ids = self._our_ids[theirs.observed_ids[place_N[found]]]
        place_N[found[their_ids != ours.observed_ids[found]]] = -1  # a text that stands twice
        return place_N, NOT_ALIGNED

    @cached_property
    def _our_ids(self) -> NDArray[np.int32]:
        """The base's id of each id of the teacher, or −1."""
        ours, theirs = self._vocabularies
        found = matching_ids(theirs, ours)
        size = max(len(found), self.folder.settings["vocab_size"])
        ids = np.full(size, -1, np.int32)
        ids[: len(found)] = np.where(found < self.base.settings["vocab_size"], found, -1)
        return ids


def vocabularies(
    base: SealedFolder, teachers: Sequence[SealedFolder], models: Sequence[str]
) -> dict[str, Vocabulary]:
    """The vocabulary of every folder's tokenizer, by its hash; none if all have the same one.

    `models` are folders, or names on the hub. Raises UserError where one is lacking, or unused.
    """
    folders = {folder.settings["tokenizer_hash"]: folder for folder in (*teachers, base)}
    if len(folders) == 1:
        if models:
            raise UserError(
                f"--tokenizer {models[0]}: all scores were made with one tokenizer: leave it out"
            )
        return {}
    found: dict[str, Vocabulary] = {}
    for model in models:
        tokenizer = load_tokenizer(model, local=False, option="--tokenizer")
        own = tokenizer_hash(tokenizer)
        if own not in folders:
            raise UserError(
                f"--tokenizer {model}: has tokenizer {own[:12]}…, with which none of these scores "
                f"was made: give the model of {_missing(folders, found)}"
            )
        found[own] = vocabulary_of(tokenizer)
    if len(found) < len(folders):
        own = base.settings["tokenizer_hash"]
        other = next(each for each in teachers if each.settings["tokenizer_hash"] != own)
        raise UserError(
            f"{other.path}: made with another tokenizer than {base.path}: give the model of "
            f"{_missing(folders, found)} with --tokenizer, to map their tokens by their text"
        )
    return found


def _missing(folders: dict[str, SealedFolder], found: dict[str, Vocabulary]) -> str:
    return " and of ".join(str(each.path) for key, each in folders.items() if key not in found)
