"""A teacher for each row: a column of the demonstrations names it, as a code teacher for code.

The demonstrations are read again for their ids and the column. A teacher's folder needs to hold
only the examples that are its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...pipeline.errors import UserError, shown
from ...pipeline.folders.join import Join
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.batches import FlatBatch, flatten, split
from ...pipeline.format.records import ScoredExample
from ...pipeline.storage.json_files import sha256_of_json
from ..demonstrations.demonstration import UnusableError
from ..demonstrations.formats import row_id
from ..demonstrations.messages import value_of
from ..demonstrations.sources import open_sources


@dataclass(frozen=True, slots=True)
class ByColumn:
    """The column, its value for each teacher in order, and the demonstrations that have it."""

    column: str
    values: tuple[str, ...]
    demonstrations: tuple[str, ...]


class TeacherByColumn:
    """Scores of the base's examples, each by the teacher that its row names.

    Raises UserError for an example whose row is not found, has no value or an unknown one, and for
    one that its teacher's folder lacks or holds with other tokens.
    """

    def __init__(
        self, base: SealedFolder, folders: Sequence[SealedFolder], choice: ByColumn
    ) -> None:
        self.base = base
        self.folders = tuple(folders)
        self.folder = self.folders[0]
        self.schema = self.folder.schema
        self.choice = choice
        for folder in folders:
            _refuse_other_tokenizer(base, folder)
            self._refuse_other_shape(folder)
        self._joins = [Join(base, folder) for folder in folders]
        values = _values(choice)
        self._places = {
            shard: [self._place_of(each, values) for ids in base.ids(shard) for each in ids]
            for shard in base.shards
        }
        for place, join in enumerate(self._joins):
            self._refuse_missing(place, join)

    @property
    def described(self) -> dict[str, Any]:
        """The choice for the identity of targets, with a hash of the teachers of all examples."""
        places = list(chain.from_iterable(self._places.values()))
        return {
            "teacher_column": self.choice.column,
            "teacher_values": list(self.choice.values),
            "teacher_of_rows": sha256_of_json(places),
        }

    def batches(self, shard: int) -> Iterator[tuple[FlatBatch, FlatBatch]]:
        """The batches of a shard of the base, each with the scores by the rows' teachers."""
        places = iter(self._places[shard])
        read = zip(*(join.records(shard) for join in self._joins), strict=True)
        for batch, found in zip(self.base.batches(shard), read, strict=True):
            own: list[ScoredExample] = []
            for row, ours in enumerate(split(self.base.schema, batch)):
                place = next(places)
                theirs = found[place][row]
                self._refuse_other_example(ours, theirs, self.folders[place])
                own.append(theirs)
            yield batch, flatten(self.schema, own)

    def _place_of(self, example: str, values: dict[str, str | None]) -> int:
        """The place of the teacher of an example of the base."""
        column, known = self.choice.column, self.choice.values
        if example not in values:
            raise UserError(
                f"{self.base.path}: its example {example} is not among the demonstrations "
                f"{', '.join(self.choice.demonstrations)}: give those that it was made from"
            )
        value = values[example]
        if value not in known:
            lacks = f"no field {column}" if value is None else f"{column} {shown(value)}"
            raise UserError(
                f"--teacher-column {column}: example {example} has {lacks}: give a teacher for it "
                f"(there is one for {', '.join(known)}), or leave it out with `qpipe subset`"
            )
        return known.index(value)

    def _refuse_other_shape(self, folder: SealedFolder) -> None:
        for name in ("top_k", "vocab_size"):
            ours, theirs = (each.settings[name] for each in (self.folder, folder))
            if ours != theirs:
                raise UserError(
                    f"{folder.path}: its {name} is {theirs}, that of {self.folder.path} is {ours}: "
                    "with --teacher-column all teachers need the same"
                )

    def _refuse_missing(self, place: int, join: Join) -> None:
        """Refuse a folder in which a search would not find each example of its own once."""
        way_out = f"score the teacher with --at {self.base.path}"
        if all(map(join.is_in_step, self.base.shards)):
            return
        repeated = join.repeated()
        if repeated is not None:
            raise UserError(f"{join.other.path}: holds example {repeated} twice: {way_out}")
        missing = set(join.missing())
        for shard, places in self._places.items():
            for example, own in zip(chain.from_iterable(self.base.ids(shard)), places, strict=True):
                if own == place and example in missing:
                    raise UserError(
                        f"{join.other.path}: lacks example {example}, which --teacher-column "
                        f"{self.choice.column} gives to it: {way_out}"
                    )

    def _refuse_other_example(
        self, ours: ScoredExample, theirs: ScoredExample, folder: SealedFolder
    ) -> None:
        names = ("observed_ids",) if "context" in folder.settings else ("input_ids", "positions")
        if not all(np.array_equal(getattr(ours, n), getattr(theirs, n)) for n in names):
            raise UserError(
                f"{folder.path}: its example {ours.id} has other tokens than in {self.base.path}: "
                f"score the teacher with --at {self.base.path}"
            )


def _values(choice: ByColumn) -> dict[str, str | None]:
    """The value of the column by the id of a row, None where a row lacks it."""
    values: dict[str, str | None] = {}
    for source in open_sources(choice.demonstrations):
        for line, raw in source.rows():
            try:
                row = value_of(raw)
                if not isinstance(row, dict):
                    continue
                example = row_id(row) or f"{source.name}:{line}"
            except UnusableError:  # rejected when the folder was made
                continue
            value = row.get(choice.column)
            text = None if value is None else str(value)
            if values.setdefault(example, text) != text:
                raise UserError(
                    f"{source.origin}, line {line}: {choice.column} is {shown(text)}, and "
                    f"{shown(values[example])} in an earlier row of the same id {example}"
                )
    return values


def _refuse_other_tokenizer(base: SealedFolder, folder: SealedFolder) -> None:
    """Raise UserError for a teacher with another tokenizer than the base's."""
    ours, theirs = (each.settings["tokenizer_hash"] for each in (base, folder))
    if ours != theirs:
        raise UserError(
            f"{folder.path}: made with tokenizer {theirs[:12]}…, {base.path} with "
            f"{ours[:12]}…: a teacher must have the base's tokenizer"
        )
