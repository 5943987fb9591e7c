"""`qpipe export`: writes a score folder as a file for another training tool.

"megatron" makes a folder (`export_megatron`). The others are parquet with `input_ids`,
`attention_mask`, `labels` and the entries as lists of lists, which are padded where a token is not
supervised:

- "axolotl": `target_token_ids`, `target_logprobs` and `target_mask`. Row r holds the entries of
  token r + 1; the last row is padding.
- "veomni": `teacher_topk_ids` and `teacher_topk_log_probs`, the inputs of VeOmni's and verl's top-k
  loss. Row r holds the k most probable entries of token r itself, as the labels do.
"""

from dataclasses import dataclass, replace
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
from .export_megatron import export_megatron
from .settings import ExportFormat, ExportSettings, Mass
from .topk_rows import IGNORED

BATCH_ROWS = 64
PADDING = -1e9  # the log-probability of padding
_COMMON = {
    "id": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "attention_mask": pa.list_(pa.int8()),
    "labels": pa.list_(pa.int32()),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """The columns of a format, and the row of a token's entries: `shift` before its own."""

    ids: str
    log_probs: str
    mask: str  # "" for none
    shift: int
    is_fixed: bool  # whether every position has k entries

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        kinds = {self.ids: pa.int32(), self.log_probs: pa.float32(), self.mask: pa.int8()}
        nested = {name: pa.list_(pa.list_(kind)) for name, kind in kinds.items() if name}
        return pa.schema(_COMMON | nested)


_LAYOUTS: dict[ExportFormat, _Layout] = {
    "axolotl": _Layout("target_token_ids", "target_logprobs", "target_mask", 1, False),
    "veomni": _Layout("teacher_topk_ids", "teacher_topk_log_probs", "", 0, True),
}


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
    if settings.format == "megatron":
        if settings.mass != "model":
            raise UserError("--format megatron holds the model's own mass: give --mass model")
        export_megatron(scores, settings.out, settings.sequence_length)
        return scores.manifest
    layout = _LAYOUTS[settings.format]
    most = scores.settings["top_k"] if layout.is_fixed else None
    with atomic_file(settings.out) as file, pq.ParquetWriter(file, layout.schema) as writer:
        batch: list[dict[str, Any]] = []
        with progress_bar(total=totals["rows"], desc="export", unit="row") as progress:
            for example in scores.records():
                batch.append(_row(_cut(example, most), settings.mass, layout, most))
                progress.update()
                if len(batch) == BATCH_ROWS:
                    writer.write_batch(_encoded(batch, layout))
                    batch = []
        writer.write_batch(_encoded(batch, layout))
    return scores.manifest


def _cut(example: ScoredExample, most: int | None) -> ScoredExample:
    """The example with at most so many entries at a position, the most probable ones."""
    counts = example.counts
    if most is None or counts.max(initial=0) <= most:
        return example
    ranks_K = np.arange(len(example.topk_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_kept = ranks_K < most
    ids, logs = example.topk_ids[is_kept], example.topk_log_probs[is_kept]
    return replace(example, counts=np.minimum(counts, most), topk_ids=ids, topk_log_probs=logs)


def _row(example: ScoredExample, mass: Mass, layout: _Layout, most: int | None) -> dict[str, Any]:
    """An example's columns; entries as [T, width], padded; the width is `most`, if given."""
    counts, logs = example.counts, example.topk_log_probs.astype(np.float64)
    if mass == "top-k":
        logs = logs - np.repeat(np.log(segment_sums(np.exp(logs), counts)), counts)
    tokens, width = len(example.input_ids), most or int(counts.max(initial=1))
    rows_K = np.repeat(example.positions - layout.shift, counts)
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
        (layout.ids, example.topk_ids, 0, np.int32),
        (layout.log_probs, logs, PADDING, np.float32),
        (layout.mask, np.ones(len(logs)), 0, np.int8),
    ):
        row[name] = np.full((tokens, width), fill, dtype)
        row[name][rows_K, columns_K] = values_K
    return row


def _encoded(rows: list[dict[str, Any]], layout: _Layout) -> pa.RecordBatch:
    arrays = []
    for field in layout.schema:
        values = [row[field.name] for row in rows]
        if field.name not in _COMMON:
            arrays.append(_lists_of_lists(values, field.type.value_type.value_type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=layout.schema)


def _lists_of_lists(values: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    widths = np.concatenate([[0], *(np.full(len(each), each.shape[1]) for each in values)])
    ends = np.cumsum([0, *(len(each) for each in values)])
    none = np.empty(0, kind.to_pandas_dtype())
    flat = np.concatenate([none, *(each.ravel() for each in values)])
    inner = pa.ListArray.from_arrays(pa.array(np.cumsum(widths), pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner)
