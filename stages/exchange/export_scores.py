"""`qpipe export`: writes a score folder as a file for another training tool.

The format "axolotl" is parquet with `input_ids`, `attention_mask`, `labels`, and the entries as
`target_token_ids`, `target_logprobs` and `target_mask`. Row r of these holds the entries of token
r + 1; the last row and the rows of a prompt hold padding.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Manifest
from ...pipeline.folders.sealed import open_sealed
from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import ScoredExample
from ...pipeline.progress import progress_bar
from ...pipeline.storage.files import atomic_file
from ...pipeline.storage.remote import is_remote
from .settings import ExportSettings, Mass
from .topk_rows import IGNORED

BATCH_ROWS = 64
PADDING = -1e9  # the log-probability of padding
_ROWS = pa.list_(pa.list_(pa.int32()))
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "attention_mask": pa.list_(pa.int8()),
        "labels": pa.list_(pa.int32()),
        "target_token_ids": _ROWS,
        "target_logprobs": pa.list_(pa.list_(pa.float32())),
        "target_mask": pa.list_(pa.list_(pa.int8())),
    }
)


def export_scores(settings: ExportSettings) -> Manifest:
    """Write the file atomically and return the folder's manifest.

    Raises UserError if the file exists, or if the folder has token weights.
    """
    scores = open_sealed(settings.scores, "score")
    totals = scores.manifest.totals
    if settings.out.exists():
        raise UserError(f"{settings.out}: already exists: give another --out, or remove it")
    if not (is_remote(settings.out) or settings.out.parent.is_dir()):
        raise UserError(f"{settings.out.parent}: no such folder")
    if totals["sums"].get("weighted"):
        raise UserError(
            f"{settings.scores}: has token weights, which the format cannot store: score the "
            "demonstrations without weights"
        )
    with atomic_file(settings.out) as file, pq.ParquetWriter(file, _SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        with progress_bar(total=totals["rows"], desc="export", unit="row") as progress:
            for example in scores.records():
                batch.append(_row(example, settings.mass))
                progress.update()
                if len(batch) == BATCH_ROWS:
                    writer.write_batch(_encoded(batch))
                    batch = []
        writer.write_batch(_encoded(batch))
    return scores.manifest


def _row(example: ScoredExample, mass: Mass) -> dict[str, Any]:
    """An example's columns; entries as [T, width], padded."""
    counts, logs = example.counts, example.topk_log_probs.astype(np.float64)
    if mass == "top-k":
        logs = logs - np.repeat(np.log(segment_sums(np.exp(logs), counts)), counts)
    tokens, width = len(example.input_ids), int(counts.max(initial=1))
    rows_K = np.repeat(example.positions - 1, counts)
    columns_K = np.arange(len(logs)) - np.repeat(np.cumsum(counts) - counts, counts)
    labels = np.full(tokens, IGNORED, np.int32)
    labels[example.positions] = example.observed_ids
    row: dict[str, Any] = {
        "id": example.id,
        "input_ids": example.input_ids,
        "attention_mask": np.ones(tokens, np.int8),
        "labels": labels,
    }
    for name, values_K, fill, dtype in (
        ("target_token_ids", example.topk_ids, 0, np.int32),
        ("target_logprobs", logs, PADDING, np.float32),
        ("target_mask", np.ones(len(logs)), 0, np.int8),
    ):
        row[name] = np.full((tokens, width), fill, dtype)
        row[name][rows_K, columns_K] = values_K
    return row


def _encoded(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    arrays = []
    for field in _SCHEMA:
        values = [row[field.name] for row in rows]
        if field.name.startswith("target_"):
            arrays.append(_lists_of_lists(values, field.type.value_type.value_type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _lists_of_lists(values: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    widths = np.concatenate([[0], *(np.full(len(each), each.shape[1]) for each in values)])
    ends = np.cumsum([0, *(len(each) for each in values)])
    none = np.empty(0, kind.to_pandas_dtype())
    flat = np.concatenate([none, *(each.ravel() for each in values)])
    inner = pa.ListArray.from_arrays(pa.array(np.cumsum(widths), pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner)
