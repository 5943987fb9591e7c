"""What a shard holds: the columns of each stage's Arrow files, and the format's version.

A column belongs to a level: one value an example, or a list of values in each row, one a token (T),
one a supervised position (N) or one a support entry (K). A list column is a plain Arrow list, so
pyarrow, `datasets` and polars open a shard without this package.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from .records import Example, ScoredExample, TargetExample

FORMAT_VERSION = 2

Level = Literal["example", "token", "position", "entry"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a shard; the record's field of the same name holds it decoded."""

    name: str
    level: Level
    dtype: type  # in memory; str for text
    stored: type  # in the file, where narrower

    @property
    def arrow_type(self) -> pa.DataType:
        """The column's type in the file."""
        value_type = pa.string() if self.stored is str else pa.from_numpy_dtype(self.stored)
        return value_type if self.level == "example" else pa.list_(value_type)


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of one stage's shards, and the record that a row decodes to."""

    record: type[Example]
    columns: tuple[Column, ...]

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema of a shard."""
        return pa.schema([(column.name, column.arrow_type) for column in self.columns])

    @property
    def lists(self) -> tuple[Column, ...]:
        """The columns that hold a list in each row."""
        return tuple(column for column in self.columns if column.level != "example")


def schema_of(stage: str, vocab_size: int) -> Schema:
    """The schema of a stage's shards; vocabulary ids take two bytes where they fit."""
    narrow = np.uint16 if vocab_size <= 2**16 else np.int32
    record, columns = _OF_STAGE[stage]
    return Schema(
        record,
        tuple(
            Column(name, level, dtype, narrow if name.endswith("_ids") else dtype)
            for name, level, dtype in _EXAMPLE + columns
        ),
    )


_Columns = tuple[tuple[str, Level, type], ...]
_EXAMPLE: _Columns = (
    ("id", "example", str),
    ("input_ids", "token", np.int32),
    ("positions", "position", np.int32),
)
_SCORES: _Columns = (
    ("observed_log_probs", "position", np.float32),
    ("observed_ranks", "position", np.int32),
    ("counts", "position", np.int32),
    ("topk_ids", "entry", np.int32),
    ("topk_log_probs", "entry", np.float32),
    ("tail_mass", "position", np.float32),
    ("token_weights", "position", np.float32),
)
_TARGETS: _Columns = (
    ("trust", "position", np.float32),
    ("counts", "position", np.int32),
    ("support_ids", "entry", np.int32),
    ("support_probs", "entry", np.float32),
    ("tail_mass", "position", np.float32),
    ("weights", "position", np.float32),
)
_OF_STAGE: dict[str, tuple[type[Example], _Columns]] = {
    "score": (ScoredExample, _SCORES),
    "build-targets": (TargetExample, _TARGETS),
}
