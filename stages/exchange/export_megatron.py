"""Writes a score folder as a folder of Megatron-LM's tars, with the tokens of the samples.

The layout is that of `megatron`, as one data-parallel rank in micro-batches of one: sample n is
column n mod 64 of iteration n // 64. Each sample has the same number of rows; those without entries
hold -1e3 and id -1, which Megatron-LM's loss leaves out.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.format.records import ScoredExample
from ...pipeline.progress import progress_bar
from .megatron import FORMAT_VERSION, META
from .topk_rows import IGNORED

BATCH = 64  # samples of an iteration
TAR_ITERATIONS = 16
ABSENT = -1e3
MOST_IDS = 2**17
T = TypeVar("T")
_TOKENS = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


def export_megatron(scores: SealedFolder, out: Path, length: int | None) -> None:
    """Write the folder, or nothing. Raises UserError for what the format cannot hold."""
    if length is None:
        raise UserError(
            "--format megatron needs --sequence-length: give the --seq-length of the student's run"
        )
    vocab_size = scores.settings["vocab_size"]
    if vocab_size > MOST_IDS:
        raise UserError(
            f"{scores.path}: has {vocab_size:,} ids, Megatron-LM's tars hold at most {MOST_IDS:,}"
        )
    width = scores.settings["top_k"]
    saver = {"k": width, "p": None, "min_k": 1, "save_dtype": "fp32"}
    saver |= {"format_version": FORMAT_VERSION, "mbs_save": 1, "dp_size_save": 1, "gbs_save": BATCH}
    meta = json.dumps({"hash": None, "identifiers": {}, "saver": saver}).encode()
    iterations = enumerate(_groups(_examples(scores, length), BATCH))
    with _new_folder(out) as folder, pq.ParquetWriter(folder / "tokens.parquet", _TOKENS) as tokens:
        for group in _groups(iterations, TAR_ITERATIONS):
            with tarfile.open(folder / f"dp0__{group[-1][0]}.tar", "w") as tar:
                _add(tar, META, meta)
                for iteration, examples in group:
                    _add(tar, f"{iteration}.pt.zst", _payload(examples, length, width))
                    tokens.write_batch(_tokens(examples))


def _examples(scores: SealedFolder, length: int) -> Iterator[ScoredExample]:
    """The examples, none longer than a sample."""
    total = scores.manifest.totals["rows"]
    with progress_bar(total=total, desc="export", unit="row") as progress:
        for example in scores.records():
            if len(example.input_ids) > length + 1:
                raise UserError(
                    f"{scores.path}: example {example.id} has {len(example.input_ids)} tokens, "
                    f"--sequence-length {length} takes {length + 1}: give a larger one"
                )
            yield example
            progress.update()


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`; the last may be shorter."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


def _payload(examples: Sequence[ScoredExample], length: int, width: int) -> bytes:
    """The entries of an iteration: [length, BATCH, width] each, compressed."""
    import torch

    values = np.full((length, BATCH, width), ABSENT, np.float32)
    ids = np.full((length, BATCH, width), -1, np.int64)
    for column, example in enumerate(examples):
        counts = example.counts
        ranks_K = np.arange(len(example.topk_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        is_kept = ranks_K < width
        rows_K = np.repeat(example.positions - 1, counts)[is_kept]
        values[rows_K, column, ranks_K[is_kept]] = example.topk_log_probs[is_kept]
        ids[rows_K, column, ranks_K[is_kept]] = example.topk_ids[is_kept]
    file = io.BytesIO()
    tensors = {
        "values": torch.from_numpy(values),
        "indices_low": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
        "bit_17": torch.from_numpy((ids >> 16).astype(bool)),
    }
    torch.save({**tensors, "format_version": FORMAT_VERSION}, file)
    return pa.Codec("zstd").compress(file.getvalue(), asbytes=True)


def _tokens(examples: Sequence[ScoredExample]) -> pa.RecordBatch:
    """The tokens of the samples, and their labels: -100 where a token is not supervised."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for example in examples:
        labels = np.full(len(example.input_ids), IGNORED, np.int32)
        labels[example.positions] = example.observed_ids
        columns["input_ids"].append(example.input_ids)
        columns["labels"].append(labels)
    return pa.RecordBatch.from_pydict(columns, schema=_TOKENS)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that has its name once it is complete, and is removed if that fails."""
    folder = out.with_name(f".{out.name}.part")
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        folder.rename(out)
    finally:
        rmtree(folder, ignore_errors=True)
