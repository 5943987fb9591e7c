"""The columns of each stage's shards, and the versions of the format.

A column belongs to a level: it has one value for each example, or a list with one value for each
token (T), supervised position (N) or support entry (K) of a row. Lists are plain Arrow lists, so
pyarrow, `datasets` and polars can read a shard without this package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa

from ..errors import UserError
from .packing import Packing, ScorePacking
from .records import Example, Level, ScoredExample, TargetExample

FORMAT_VERSION = 3
TARGETS_VERSION = 4
PACKED_SCORES_VERSION = 4
_RECORDS: dict[str, type[Example]] = {"score": ScoredExample, "build-targets": TargetExample}
STAGES = tuple(_RECORDS)  # the stages whose folders hold shards


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a shard; the field of the same name in the record holds it decoded."""

    name: str
    level: Level
    dtype: type  # in memory; str for text
    stored: type  # in the file; may be narrower

    @property
    def arrow_type(self) -> pa.DataType:
        """The column's type in the file."""
        value_type = pa.string() if self.stored is str else pa.from_numpy_dtype(self.stored)
        return value_type if self.level == "example" else pa.list_(value_type)


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of one stage's records, and their packing, if they are stored packed."""

    record: type[Example]
    columns: tuple[Column, ...]
    vocab_size: int
    packing: Packing | ScorePacking | None = None

    @property
    def stored(self) -> tuple[Column, ...]:
        """The columns of a shard."""
        return self.columns if self.packing is None else _packed(self.columns, self.packing)

    @property
    def as_stored(self) -> "Schema":
        """The schema that reads and writes the stored columns without packing."""
        return Schema(self.record, self.stored, self.vocab_size)

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema of a shard."""
        return pa.schema([(column.name, column.arrow_type) for column in self.stored])

    @property
    def lists(self) -> tuple[Column, ...]:
        """The columns that hold a list in each row."""
        return tuple(column for column in self.columns if column.level != "example")


def schema_of(stage: str, vocab_size: int, packing: Packing | ScorePacking | None = None) -> Schema:
    """The schema of a stage's shards; ids take two bytes if the vocabulary allows it.

    Raises UserError for a stage that makes no shards.
    """
    if stage not in _RECORDS:
        raise UserError(
            f"a folder made by `qpipe {stage}` holds no rows: give one made by "
            f"{' or '.join(f'`qpipe {each}`' for each in _RECORDS)}"
        )
    record = _RECORDS[stage]
    return Schema(record, _columns(record, vocab_size), vocab_size, packing)


def _columns(record: type[Example], vocab_size: int) -> tuple[Column, ...]:
    narrow = np.uint16 if vocab_size <= 2**16 else np.int32
    hints = get_type_hints(record, include_extras=True)
    columns = []
    for name in (each.name for each in fields(record)):
        level, dtype = getattr(hints[name], "__metadata__", ("example", str))
        columns.append(Column(name, level, dtype, narrow if name.endswith("_ids") else dtype))
    return tuple(columns)


def format_version_of(stage: str) -> int:
    """The format version of a stage's folders; packed scores have a later one."""
    return TARGETS_VERSION if stage == "build-targets" else FORMAT_VERSION


def readable_versions(stage: str) -> tuple[int, ...]:
    """The format versions of a stage's folders that are read."""
    packed = (PACKED_SCORES_VERSION,) if stage == "score" else ()
    return format_version_of(stage), *packed


def packing_of(
    stage: str, settings: Mapping[str, Any], frequent_ids: tuple[int, ...] = ()
) -> Packing | ScorePacking | None:
    """The packing in a stage's settings; None for plain columns."""
    if settings.get("precision") is None:
        return None
    if stage == "score":
        return ScorePacking(settings["vocab_size"])
    return Packing(
        settings["precision"],
        settings["vocab_size"],
        # a truncated support holds max_support entries plus the observed token; any other holds
        # the observed token alone
        min(1 + (settings["max_support"] or 0), settings["vocab_size"]),
        frequent_ids,
    )


def _packed(columns: tuple[Column, ...], packing: Packing | ScorePacking) -> tuple[Column, ...]:
    """The stored columns for the columns of records."""
    instead = (
        _packed_scores(packing) if isinstance(packing, ScorePacking) else _packed_targets(packing)
    )
    return tuple(stored for column in columns for stored in instead.get(column.name, (column,)))


def _packed_scores(packing: ScorePacking) -> dict[str, tuple[Column, ...]]:
    high = _narrowest(packing.vocab_size >> 8)
    return {
        "topk_ids": (
            Column("topk_ids_low", "entry", np.uint8, np.uint8),
            Column("topk_ids_high", "entry", high, high),
        ),
        "topk_log_probs": (
            Column("log_prob_steps_low", "entry", np.uint8, np.uint8),
            Column("log_prob_steps_high", "entry", np.uint8, np.uint8),
        ),
        "observed_log_probs": (Column("observed_codes", "position", np.uint16, np.uint16),),
        "tail_mass": (Column("tail_codes", "position", np.uint16, np.uint16),),
    }


def _packed_targets(packing: Packing) -> dict[str, tuple[Column, ...]]:
    high = _narrowest(packing.vocab_size >> 8)
    log_prob = getattr(np, packing.precision)
    return {
        "counts": (Column("counts", "position", np.int32, _narrowest(packing.most_entries)),),
        "support_ids": (
            Column("rank_steps_low", "entry", np.uint8, np.uint8),
            Column("rank_steps_high", "entry", high, high),
        ),
        "support_probs": (Column("support_log_probs", "entry", log_prob, log_prob),),
        "tail_mass": (Column("tail_log_probs", "position", log_prob, log_prob),),
    }


def _narrowest(largest: int) -> type:
    return next(each for each in (np.uint8, np.uint16, np.int32) if largest <= np.iinfo(each).max)
