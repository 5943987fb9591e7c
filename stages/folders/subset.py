"""`qpipe subset`: copies selected rows of a folder into a folder of the same stage.

Rows are copied as stored. Shard i holds the selected rows of shard i of the source.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Identity, ShardEntry, identity_schema
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.folders.shard_run import Job, StageResult
from ...pipeline.folders.shards import BATCH_ROWS, ShardContent
from ...pipeline.folders.tasks import run_alone
from ...pipeline.folders.watch import Report, Watcher
from ...pipeline.format.arrow import decode
from ...pipeline.format.batches import FlatBatch
from ...pipeline.format.ragged import segment_sums
from ...pipeline.storage.files import read_bytes
from ...pipeline.storage.json_files import sha256_of_json
from .settings import SubsetSettings

OPERATORS: dict[str, Callable[[NDArray, float], NDArray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMMON = {
    "tokens": lambda batch: batch.lengths["token"],
    "supervised_tokens": lambda batch: batch.lengths["position"],
    "mean_tail_mass": lambda batch: _means(batch, "tail_mass"),
}
_OF_STAGE: dict[str, dict[str, Callable[[FlatBatch], NDArray]]] = {
    "score": _COMMON
    | {
        "mean_nll": lambda batch: -_means(batch, "observed_log_probs"),
        "mean_weight": lambda batch: _means(batch, "token_weights"),
    },
    "build-targets": _COMMON
    | {
        "mean_trust": lambda batch: _means(batch, "trust"),
        "mean_weight": lambda batch: _means(batch, "weights"),
    },
}


@dataclass(frozen=True, slots=True, order=True)
class Condition:
    """A statistic of a row compared with a number; false for a mean over no positions."""

    name: str
    operator: str
    number: float

    def holds(self, stage: str, batch: FlatBatch) -> NDArray[np.bool_]:
        """Whether the condition holds for each row of a batch, [R]."""
        values = _OF_STAGE[stage][self.name](batch).astype(np.float64)
        return OPERATORS[self.operator](values, self.number) & ~np.isnan(values)


def parse_condition(text: str, stage: str) -> Condition:
    """Parse a condition such as `mean_nll < 2.5`.

    Raises UserError for other text, and for a statistic that folders of the stage do not have.
    """
    match = re.fullmatch(r"\s*(\w+)\s*([<>]=?|[=!]=)\s*(\S+)\s*", text)
    try:
        number = float(match[3]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise UserError(
            f"--where {text!r} is not a condition: give a statistic, one of "
            f"{' '.join(OPERATORS)} and a number, as in 'mean_nll < 2.5'"
        )
    known = _OF_STAGE[stage]
    if match[1] not in known:
        raise UserError(
            f"--where {text!r}: a folder made by `qpipe {stage}` has no {match[1]}: give one of "
            f"{', '.join(known)}"
        )
    return Condition(match[1], match[2], number)


def subset(settings: SubsetSettings) -> StageResult:
    """Make the missing shards of the folder, and seal it."""
    stage = SubsetStage(settings)
    return run_alone(stage, Watcher("subset", stage.job.identity.fingerprint))


class SubsetStage:
    """The work of one `qpipe subset`."""

    gpus = 0

    def __init__(self, settings: SubsetSettings) -> None:
        source = open_sealed(settings.folder)
        schema, manifest = source.schema, source.manifest
        self.source = source
        self.conditions = sorted({parse_condition(text, source.stage) for text in settings.where})
        self.ids = None if settings.ids is None else _read_ids(settings.ids, source)
        selection = {  # the same for any way to write it
            "ids": None if self.ids is None else sha256_of_json(sorted(self.ids)),
            "where": [[each.name, each.operator, each.number] for each in self.conditions],
        }
        identity = Identity(
            stage=source.stage,
            settings=source.settings | {"subset": selection},
            inputs={"source": manifest.fingerprint},
            schema=identity_schema(schema),
            format_version=manifest.identity.format_version,
        )
        self.job = Job(
            settings.out,
            schema.as_stored,
            identity,
            {"source": manifest.as_parent},
            manifest.provenance,
            frequent_ids=manifest.frequent_ids,
        )

    @property
    def shard_count(self) -> int | None:
        return len(self.source.shards)

    @property
    def demonstrations(self) -> int | None:
        """The number in the source: the number selected is only known at the end."""
        return self.source.size

    def start(self) -> None:
        """Nothing needs to be started."""

    def read(self, index: int) -> Iterator[tuple[pa.RecordBatch, FlatBatch]]:
        """The record batches of a shard, as stored and decoded, read as rows are selected."""
        path = self.source.shard_path(index)
        for number, stored in enumerate(self.source.stored_batches(index)):
            yield stored, decode(self.source.schema, stored, f"{path}, record batch {number}")

    def make(
        self, batches: Iterator[tuple[pa.RecordBatch, FlatBatch]], report: Report
    ) -> ShardContent:
        """Copy the selected rows of a shard."""
        content = ShardContent()
        source = self.source
        kept: list[pa.RecordBatch] = []
        for stored, batch in batches:
            keeps = self._keeps(batch)
            kept.append(stored.filter(pa.array(keeps)))
            kept_N = np.repeat(keeps, batch.lengths["position"])
            content.add_sums(**_sums(source.stage, batch, kept_N))
            report(len(keeps), int(kept_N.sum()))
        if "masked" in source.manifest.totals["sums"]:  # in which rows is not stored
            content.add_sums(masked=0)
        table = pa.Table.from_batches(kept, source.schema.arrow).combine_chunks()
        content.batches = [
            decode(self.job.schema, batch, str(source.path))
            for batch in table.to_batches(BATCH_ROWS)
        ]
        return content

    def _keeps(self, batch: FlatBatch) -> NDArray[np.bool_]:
        """Which rows of a batch are selected, [R]."""
        kept = np.ones(len(batch.ids), bool)
        if self.ids is not None:
            kept = np.array([row_id in self.ids for row_id in batch.ids], bool)
        for condition in self.conditions:
            kept &= condition.holds(self.source.stage, batch)
        return kept

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Raise UserError if no row was selected."""
        if not any(entry.rows for entry in shards):
            raise UserError(
                f"{self.source.path}: none of its {self.source.size:,} rows is selected: give "
                "another --ids or --where"
            )


def _sums(stage: str, batch: FlatBatch, kept_N: NDArray[np.bool_]) -> dict[str, float]:
    """The sums that the stage stores with a shard, recomputed from the kept positions."""
    sums = {"tail_mass": _sum(batch["tail_mass"][kept_N])}
    if stage == "score":
        weighted = (batch["token_weights"][kept_N] != 1).sum()
        observed_nll = -_sum(batch["observed_log_probs"][kept_N])
        return sums | {"observed_nll": observed_nll, "weighted": float(weighted)}
    return sums | {"trust": _sum(batch["trust"][kept_N])}


def _sum(values: NDArray[np.floating]) -> float:
    return float(values.sum(dtype=np.float64))


def _read_ids(path: Path, source: SealedFolder) -> set[str]:
    """The ids in a file. Raises UserError if the folder lacks one of them."""
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--ids {path}: not UTF-8: give a text file, one id per line") from error
    ids = {line.strip() for line in lines if line.strip()}
    if not ids:
        raise UserError(f"--ids {path}: empty: give one id per line")
    there = {row_id for shard in source.shards for batch in source.ids(shard) for row_id in batch}
    missing = sorted(ids - there)
    if missing:
        raise UserError(
            f"--ids {path}: {len(missing):,} of its ids are not in {source.path}, the first is "
            f"{missing[0]}: leave them out"
        )
    return ids


def _means(batch: FlatBatch, name: str) -> NDArray[np.float64]:
    counts = batch.lengths["position"]
    sums = segment_sums(batch[name].astype(np.float64), counts)
    with np.errstate(invalid="ignore"):
        return sums / counts
