"""`qpipe subset`: some rows of a folder, as a folder of the same stage.

Rows are copied as they are stored. Shard i holds those of the source's shard i.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import (
    Identity,
    Manifest,
    ShardEntry,
    identity_schema,
    read_manifest,
)
from ...pipeline.folders.sealed import folder_schema, shard_ids, stored_batches
from ...pipeline.folders.shard_run import Job, ShardRun, StageResult, open_folder
from ...pipeline.folders.shards import BATCH_ROWS, ShardContent
from ...pipeline.format.arrow import decode
from ...pipeline.format.batches import FlatBatch
from ...pipeline.progress import progress_bar
from ...pipeline.storage.files import read_bytes
from ...pipeline.storage.json_files import sha256_of_json
from ...pipeline.storage.locks import locked
from .conditions import Condition, parse_condition


@dataclass(frozen=True, slots=True)
class SubsetSettings:
    """The options of `qpipe subset`: a row stays if its id is listed and every condition holds."""

    folder: Path
    out: Path
    ids: Path | None = None  # a file, an id a line; None: all
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ids is None and not self.where:
            raise UserError("nothing says which rows: give --ids FILE, or --where 'NAME < NUMBER'")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows of a folder stay."""

    ids: frozenset[str] | None
    conditions: tuple[Condition, ...]

    def keeps(self, stage: str, batch: FlatBatch) -> NDArray[np.bool_]:
        """Which rows of a batch stay, [R]."""
        kept = np.ones(len(batch.ids), bool)
        if self.ids is not None:
            kept = np.array([row_id in self.ids for row_id in batch.ids], bool)
        for condition in self.conditions:
            kept &= condition.holds(stage, batch)
        return kept

    def described(self) -> dict[str, Any]:
        """The choice as settings: the same for the same rows, however it was written."""
        return {
            "ids": None if self.ids is None else sha256_of_json(sorted(self.ids)),
            "where": [[each.name, each.operator, each.number] for each in self.conditions],
        }


def subset(settings: SubsetSettings) -> StageResult:
    """Make the folder, or what is missing of it."""
    manifest = read_manifest(settings.folder)
    folder_schema(manifest)  # refuses a folder without rows
    stage = manifest.identity.stage
    conditions = {parse_condition(text, stage) for text in settings.where}
    ids = None if settings.ids is None else _listed(settings.ids)
    if ids is not None and settings.ids is not None:
        _refuse_missing(settings.folder, manifest, settings.ids, ids)
    choice = Choice(ids, tuple(sorted(conditions)))
    job = _job(settings, manifest, choice)
    with locked(settings.out):
        done = open_folder(settings.out, job.identity)
        if done is not None:
            return StageResult(done, was_done=True)
        return _run(settings.folder, manifest, choice, job)


def _job(settings: SubsetSettings, source: Manifest, choice: Choice) -> Job:
    schema = folder_schema(source)
    identity = Identity(
        stage=source.identity.stage,
        settings=source.settings | {"subset": choice.described()},
        inputs={"source": source.fingerprint},
        schema=identity_schema(schema),
        format_version=source.identity.format_version,
    )
    parents = {"source": {"identity": asdict(source.identity), "parents": source.parents}}
    return Job(
        settings.out,
        schema.as_stored,
        identity,
        parents,
        source.provenance,
        frequent_ids=source.frequent_ids,
    )


def _run(folder: Path, source: Manifest, choice: Choice, job: Job) -> StageResult:
    run = ShardRun(job)
    tasks = (
        (index, partial(_shard, folder, source, entry, choice))
        for index, entry in enumerate(source.shards)
    )
    with progress_bar(total=source.totals["rows"], desc="subset", unit="row") as progress:
        for entry, own in zip(run.shards(tasks), source.shards, strict=True):
            progress.update(own.rows)
            progress.set_postfix(kept=entry.rows)
    if not any(entry.rows for entry in run.committed.values()):
        raise UserError(
            f"{folder}: none of its {source.totals['rows']:,} rows is in the subset: give another "
            "--ids or --where"
        )
    return run.seal()


def _shard(folder: Path, source: Manifest, entry: ShardEntry, choice: Choice) -> ShardContent:
    schema, stage = folder_schema(source), source.identity.stage
    content = ShardContent()
    kept: list[pa.RecordBatch] = []
    for number, stored in enumerate(stored_batches(folder, source, entry)):
        batch = decode(schema, stored, f"{folder / entry.file}, record batch {number}")
        keeps = choice.keeps(stage, batch)
        kept.append(stored.filter(pa.array(keeps)))
        content.add_sums(**_sums(stage, batch, np.repeat(keeps, batch.lengths["position"])))
    table = pa.Table.from_batches(kept, schema.arrow).combine_chunks()
    content.batches = [
        decode(schema.as_stored, batch, f"{folder / entry.file}")
        for batch in table.to_batches(BATCH_ROWS)
    ]
    return content


def _sums(stage: str, batch: FlatBatch, kept_N: NDArray[np.bool_]) -> dict[str, float]:
    """What a stage adds up over its positions, as far as the rows tell it."""
    sums = {"tail_mass": _sum(batch["tail_mass"][kept_N])}
    if stage == "score":
        weighted = (batch["token_weights"][kept_N] != 1).sum()
        observed_nll = -_sum(batch["observed_log_probs"][kept_N])
        return sums | {"observed_nll": observed_nll, "weighted": float(weighted)}
    return sums | {"trust": _sum(batch["trust"][kept_N])}


def _sum(values: NDArray[np.floating]) -> float:
    return float(values.sum(dtype=np.float64))


def _listed(path: Path) -> frozenset[str]:
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--ids {path}: not UTF-8: give a text file, an id a line") from error
    ids = frozenset(line.strip() for line in lines if line.strip())
    if not ids:
        raise UserError(f"--ids {path}: no id in it: give one a line")
    return ids


def _refuse_missing(folder: Path, source: Manifest, path: Path, ids: Iterable[str]) -> None:
    there = {
        row_id
        for entry in source.shards
        for batch in shard_ids(folder, source, entry)
        for row_id in batch
    }
    missing = sorted(set(ids) - there)
    if missing:
        raise UserError(
            f"--ids {path}: {len(missing):,} of its ids are not in {folder}, the first is "
            f"{missing[0]}: leave them out"
        )
