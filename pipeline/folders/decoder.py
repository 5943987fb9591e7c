"""Decoded columns for tools that read the shards by themselves, such as `datasets`.

T tokens of a row, N supervised positions, K entries of all of them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..format.arrow import decode
from ..format.schema import Column, Schema
from ..storage.remote import open_path
from .sealed import open_sealed

Columns = dict[str, list[Any]]


def decoder(folder: str | Path) -> Callable[[Mapping[str, Any]], Columns]:
    """What turns rows of a folder's shards, as columns of lists, into decoded columns.

    Those of targets are id, input_ids (T numbers a row), positions, trust, weights, tail_mass (N
    numbers a row), support_ids and support_probs (N lists a row); those of scores are as in
    `ScoredExample`, with N lists a row for topk_ids and topk_log_probs. Columns that are not the
    folder's are left out. Raises UserError where the folder is not sealed, and when called for rows
    that are not the folder's.
    """
    return partial(_decoded, open_sealed(open_path(folder)).schema, str(folder))


def _decoded(schema: Schema, folder: str, rows: Mapping[str, Any]) -> Columns:
    arrow = schema.arrow
    missing = [name for name in arrow.names if name not in rows]
    if missing:
        raise UserError(
            f"decoder of {folder}: the rows lack column {missing[0]}: give it all columns of a "
            "shard, before any of them is removed"
        )
    try:
        arrays = [pa.array(rows[field.name], field.type) for field in arrow]
        stored = pa.RecordBatch.from_arrays(arrays, schema=arrow)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"decoder of {folder}: its rows are not that folder's: {error}") from error
    batch = decode(schema, stored, f"decoder of {folder}")
    entries = _ends(batch["counts"])
    columns: Columns = {"id": batch.ids}
    for column in schema.lists:
        if column.name != "counts":
            rows_of = _ends(batch.lengths["position" if _is_nested(column) else column.level])
            values: pa.Array = pa.array(batch[column.name])
            if _is_nested(column):
                values = pa.ListArray.from_arrays(entries, values)
            columns[column.name] = pa.ListArray.from_arrays(rows_of, values).to_pylist()
    return columns


def _is_nested(column: Column) -> bool:
    """Whether a row holds a list of it at each position."""
    return column.level == "entry"


def _ends(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
