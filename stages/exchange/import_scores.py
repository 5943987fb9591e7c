"""`qpipe import`: makes a score folder from a file of log-probabilities of another tool.

The file is parquet with `input_ids`, ids and log-probabilities as lists of lists and, optionally,
`labels` and `attention_mask`. There are two layouts:

- "axolotl": `target_token_ids`, `target_logprobs`, `target_mask`, and `labels`. The entries of row
  r are those of token r + 1; in files of older versions, in which `target_mask` equals the mask of
  the labels, those of token r.
- "distillkit": one column of lists of ids, one of lists of log-probabilities, under any names.
  The entries of row r are those of token r + 1. The packed form (`distillkit`) is read with its
  settings.
- "megatron": `input_ids` alone; the entries are in tars (`megatron`), row r those of token r + 1.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.errors import UserError, one_line, reason, require_utf8
from ...pipeline.folders.manifest import Identity, ShardEntry, identity_schema
from ...pipeline.folders.provenance import package_versions
from ...pipeline.folders.shard_run import Job, StageResult
from ...pipeline.folders.shards import ShardContent, batches_of
from ...pipeline.folders.tasks import run_alone
from ...pipeline.folders.watch import Report, Watcher
from ...pipeline.format.records import Reject, ScoredExample
from ...pipeline.format.schema import schema_of
from ...pipeline.storage.cache import local_version
from ...pipeline.storage.files import sha256_of_file
from ...trainer.models.files import ModelFiles, find_model
from ..demonstrations.demonstration import UnusableError
from ..demonstrations.readers.columnar import open_parquet, parquet_batches
from ..score.stage import refuse_nothing_scored, score_sums
from .distillkit import described as described_codec
from .distillkit import read_codec
from .megatron import Tars
from .settings import Format, ImportSettings, Mass
from .topk_rows import IGNORED, ImportRules, Ints, TopK, TopKRow, scored, without_padding

SHARD_ROWS = 512
READ_ROWS = 16  # at once: a row may have a hundred thousand entries
_PACKED = ("bytepacked_indices", "compressed_logprobs")
_OPTIONAL = ("id", "labels", "attention_mask", "target_mask")
MASS_OF: dict[Format, Mass] = {"axolotl": "top-k", "distillkit": "model", "megatron": "model"}


def import_scores(settings: ImportSettings) -> StageResult:
    """Make the missing shards of the score folder of a file, and seal it."""
    stage = ImportStage(settings)
    return run_alone(stage, Watcher("import", stage.job.identity.fingerprint))


class ImportStage:
    """The work of one `qpipe import`."""

    gpus = 0

    def __init__(self, settings: ImportSettings) -> None:
        self.table = _Table(settings.file, settings.format, settings.codec)
        self.table.tars = _tars(settings)
        model = find_model(settings.model, settings.revision)
        self.rules = ImportRules(
            top_k=settings.top_k or self.table.first_width(),
            mass=settings.mass or MASS_OF[settings.format],
            vocab_size=model.vocab_size,
            max_length=model.max_length,
        )
        self.job = _job(settings, model, self.rules, self.table)
        self._rows = self.table.rows()
        self._next = 0  # index of the shard that `_rows` continues with

    @property
    def shard_count(self) -> int | None:
        return -(-self.table.count // SHARD_ROWS)

    @property
    def demonstrations(self) -> int | None:
        return self.table.count

    def start(self) -> None:
        """Nothing needs to be started."""

    def read(self, index: int) -> tuple[list[ScoredExample], ShardContent]:
        """The examples of a shard, and its rejects; shards are read in ascending order."""
        deque(islice(self._rows, (index - self._next) * SHARD_ROWS), maxlen=0)
        self._next = index + 1
        examples, content = [], ShardContent()
        for line, values in islice(self._rows, SHARD_ROWS):
            try:
                row = self.table.parse(line, values)
                example, left_out = scored(row, self.rules)
            except UnusableError as error:
                content.rejects.append(Reject(self.table.path.name, line, reason(error)))
                continue
            content.add_sums(left_out=left_out)
            if self.table.codec is not None:
                content.add_sums(scaled=row.scaled)
            examples.append(example)
        return examples, content

    def make(self, shard: tuple[list[ScoredExample], ShardContent], report: Report) -> ShardContent:
        """Flatten the examples of a shard into batches."""
        examples, content = shard
        content.batches = batches_of(self.job.schema, examples)
        content.add_sums(**score_sums(examples))
        rejects = len(content.rejects)
        report(len(examples) + rejects, sum(len(each.positions) for each in examples), rejects)
        return content

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Raise UserError if no row of the file could be used."""
        refuse_nothing_scored(shards)


def _job(settings: ImportSettings, model: ModelFiles, rules: ImportRules, table: "_Table") -> Job:
    schema = schema_of("score", model.vocab_size)
    described = {
        "imported": settings.format,
        "mass": rules.mass,
        "top_k": rules.top_k,
        "vocab_size": model.vocab_size,
        "tokenizer_hash": model.tokenizer_hash,
        "max_length": model.max_length,
        "shard_size": SHARD_ROWS,
        **described_codec(table.codec),
    }
    identity = Identity(
        stage="score",
        settings=described,
        inputs={
            settings.file.name: sha256_of_file(local_version(settings.file)),
            **({} if table.tars is None else table.tars.hashes()),
        },
        schema=identity_schema(schema),
    )
    provenance = {
        "model": model.name,
        "revision": model.revision,
        "import_versions": package_versions("qpipe", "pyarrow"),
    }
    return Job(settings.out, schema, identity, {}, provenance)


def _tars(settings: ImportSettings) -> Tars | None:
    """Megatron-LM's tars, if the format has them."""
    if (settings.format == "megatron") != (settings.logits is not None):
        raise UserError("--logits DIR goes with --format megatron: give both, or neither")
    return None if settings.logits is None else Tars(settings.logits)


class _Table:
    """A parquet file in one of the formats."""

    tars: Tars | None = None

    def __init__(self, path: Path, format: Format, settings: Path | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        require_utf8("file", path.name)
        try:
            self.local = local_version(path)
            self.file = open_parquet(self.local, dictionaries=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: not a parquet file: {one_line(error)}") from error
        self.format = format
        self.count = self.file.metadata.num_rows
        self.is_packed = _PACKED[1] in self.file.schema_arrow.names
        self.ids, self.log_probs = self._columns()
        self._check_kinds()
        if self.count == 0:
            raise UserError(f"{path}: empty, it has no rows")
        if settings is not None and not self.is_packed:
            raise UserError(f"--codec {settings}: {path} is not packed: leave it out")
        self.codec = read_codec(path, settings) if self.is_packed else None

    def first_width(self) -> int:
        """The number of entries of the first position that has any."""
        if self.tars is not None:
            return self.tars.certain
        if self.codec is not None:
            return self.codec.k
        for batch in self._batches([self.log_probs]):
            for each in batch.column(0):
                try:
                    counts, log_probs = _nested(each, np.float64)
                except UnusableError:
                    continue  # the row is rejected, with the reason, when it is read
                real = without_padding(TopK(counts, np.zeros(len(log_probs), int), log_probs))
                if real.counts.any():
                    return int(real.counts[real.counts > 0][0])
        raise UserError(f"{self.path}: column {self.log_probs} is empty")

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of every row, from 1, and its values by column."""
        wanted = {*_OPTIONAL, "input_ids", self.ids, self.log_probs}
        names = [name for name in self.file.schema_arrow.names if name in wanted]
        line = 0
        for batch in self._batches(names):
            for row in range(batch.num_rows):
                line += 1
                yield line, {name: batch.column(name)[row] for name in names}
        if line != self.count:
            raise UserError(f"{self.path}: damaged: holds {line:,} of {self.count:,} rows")

    def parse(self, line: int, values: dict[str, Any]) -> TopKRow:
        """Parse a row of `rows`. Raises UnusableError for values of other kinds."""
        try:
            return self._parsed(line, values)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UnusableError(reason(error)) from error

    def _parsed(self, line: int, values: dict[str, Any]) -> TopKRow:
        if self.tars is not None:
            entries, scaled = self.tars.entries(line - 1), 0
        else:
            entries, scaled = self._entries(values[self.ids], values[self.log_probs])
        tokens = _flat(values["input_ids"], "input_ids")
        labels = _flat(values["labels"], "labels") if "labels" in values else None
        if "attention_mask" in values:
            length = _length(_flat(values["attention_mask"], "attention_mask"), len(tokens))
            tokens, labels = tokens[:length], None if labels is None else labels[:length]
        shift = 1
        if self.format == "axolotl":
            assert labels is not None  # the column is there
            shift = _shift(_nested(values["target_mask"], np.int64), labels)
        given = values["id"].as_py() if "id" in values else None
        name = f"{self.path.name}:{line}" if given is None else str(given)
        return TopKRow(name, tokens, labels, shift, entries, scaled)

    def _entries(self, ids: Any, log_probs: Any) -> tuple[TopK, int]:
        """The entries of a row of the file, and how many of its positions were scaled."""
        kinds = (np.int64, np.float64) if self.codec is None else (np.uint8, np.uint8)
        pairs = _nested(ids, kinds[0]), _nested(log_probs, kinds[1])
        if len(pairs[0][0]) != len(pairs[1][0]):
            raise UnusableError(f"{self.ids} and {self.log_probs} disagree in length")
        if self.codec is not None:
            return self.codec.entries(*pairs)
        if not np.array_equal(pairs[0][0], pairs[1][0]):
            raise UnusableError(f"{self.ids} and {self.log_probs} disagree in length")
        return TopK(*pairs[0], pairs[1][1]), 0

    def _columns(self) -> tuple[str, str]:
        """The names of the columns of ids and of log-probabilities."""
        schema = self.file.schema_arrow
        if self.format == "axolotl":
            needed = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
            missing = [name for name in needed if name not in schema.names]
            if missing:
                raise UserError(f"{self.path}: no column {missing[0]}: not a file of axolotl")
            return "target_token_ids", "target_logprobs"
        if self.format == "megatron":
            if "input_ids" not in schema.names:
                raise UserError(f"{self.path}: no column input_ids: give the samples' tokens")
            return "", ""
        nested = {
            column.name: column.type.value_type.value_type
            for column in schema
            if _kind(column.type).startswith("lists of lists")
        }
        ids = [name for name, kind in nested.items() if pa.types.is_integer(kind)]
        logs = [name for name, kind in nested.items() if pa.types.is_floating(kind)]
        if self.is_packed and {"input_ids", _PACKED[0]} <= {*schema.names}:
            return _PACKED
        if "packed_indices" in schema.names:
            raise UserError(
                f"{self.path}: packed by an old DistillKit, of which nothing is read: write ids "
                "and log-probabilities as lists of lists instead"
            )
        if "input_ids" not in schema.names or len(ids) != 1 or len(logs) != 1:
            raise UserError(
                f"{self.path}: requires input_ids, one column of lists of lists of whole numbers "
                f"(ids), and one of floating-point numbers (log-probabilities); its columns are "
                f"{', '.join(schema.names)}"
            )
        return ids[0], logs[0]

    def _check_kinds(self) -> None:
        """Raise UserError for columns of other types than lists of numbers."""
        wanted = dict.fromkeys(("input_ids", "labels", "attention_mask"), "lists of whole numbers")
        wanted |= dict.fromkeys(("target_mask", self.ids), "lists of lists of whole numbers")
        numbers = "whole numbers" if self.is_packed else "numbers"
        wanted[self.log_probs] = f"lists of lists of {numbers}"
        schema = self.file.schema_arrow
        for column in schema:
            kind = _kind(column.type)
            if kind != wanted.get(column.name, kind):
                raise UserError(
                    f"{self.path}: column {column.name} holds {kind}, not {wanted[column.name]}"
                )
            if schema.names.count(column.name) > 1:
                raise UserError(f"{self.path}: column {column.name} occurs more than once")

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            for group in range(self.file.num_row_groups):
                yield from parquet_batches(self.local, self.file, group, READ_ROWS, names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{self.path}: damaged: {one_line(error)}") from error


def _kind(kind: pa.DataType) -> str:
    """A description of a column's type."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"lists of {_kind(kind.value_type)}"
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "whole numbers"
    return "numbers" if pa.types.is_floating(kind) else str(kind)


def _flat(value: Any, name: str) -> Ints:
    """A list of whole numbers."""
    if not value.is_valid or value.values.null_count:
        raise UnusableError(f"{name}: empty")
    return value.values.to_numpy(zero_copy_only=False).astype(np.int64)


def _nested(value: Any, dtype: type) -> tuple[Ints, Any]:
    """A list of lists: the length of each, and their concatenation."""
    lists = value.values if value.is_valid else None
    if lists is None or lists.null_count:
        raise UnusableError("a list of entries is missing")
    flat = pc.call_function("list_flatten", [lists])
    if flat.null_count:
        raise UnusableError("an entry is empty")
    counts = pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)
    return counts.astype(np.int64), flat.to_numpy(zero_copy_only=False).astype(dtype)


def _length(mask_T: Ints, tokens: int) -> int:
    """The number of tokens before the padding."""
    length = int((mask_T == 1).sum())
    if len(mask_T) != tokens or not (mask_T[:length] == 1).all() or mask_T[length:].any():
        raise UnusableError("attention_mask: not ones up to the padding on the right")
    return length


def _shift(mask: tuple[Ints, Ints], labels_T: Ints) -> int:
    """1 if the entries of row r are those of token r + 1, 0 if they are those of token r."""
    counts_R, flat = mask
    starts = (np.cumsum(counts_R) - counts_R)[counts_R > 0]
    rows_R = np.zeros(len(counts_R), bool)
    rows_R[counts_R > 0] = np.maximum.reduceat(flat, starts) > 0 if len(starts) else False
    size = len(labels_T)
    supervised_T = labels_T != IGNORED
    rows_T = np.append(rows_R, False)[:size] if len(rows_R) < size else rows_R[:size]
    if not rows_R[size:].any():
        if np.array_equal(rows_T, np.append(supervised_T[1:], False)):
            return 1
        if np.array_equal(rows_T[1:], supervised_T[1:]):
            return 0
    raise UnusableError("target_mask: neither the mask of the labels nor that of the next ones")
