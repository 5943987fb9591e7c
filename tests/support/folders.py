"""Small sealed folders, and functions that change them and make every hash fit again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace
from qpipe.pipeline.folders.manifest import (
    Identity,
    Manifest,
    identity_schema,
    read_manifest,
    totals_of,
    write_manifest,
)
from qpipe.pipeline.folders.row_index import INDEX
from qpipe.pipeline.folders.shard_run import (
    Job,
    ShardRun,
    StageResult,
    open_folder,
    rejects_bytes,
)
from qpipe.pipeline.folders.shards import ShardContent, batches_of, write_sidecar
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.records import Reject, ScoredExample, TargetExample
from qpipe.pipeline.format.schema import (
    PACKED_SCORES_VERSION,
    Schema,
    format_version_of,
    packing_of,
    schema_of,
)
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.storage.files import sha256_of_file
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.score.stage import score_sums

from .examples import TOP_K, VOCAB, random_scored

VOCAB_SIZE = 320  # of `folder_of`
SCORES = {"vocab_size": VOCAB, "top_k": TOP_K, "tokenizer_hash": "3fa9"}
Rows = list[Any]  # records of one stage


def seal_shards(
    folder: Path,
    stage: str,
    settings: dict[str, Any],
    shards: Sequence[Rows],
    *,
    inputs: dict[str, str] | None = None,
    parents: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    rejects: Sequence[Reject] = (),
    sums_of: Callable[[Rows], Mapping[str, float]] = lambda _: {},
    batches: Callable[[Schema, Rows], list[FlatBatch]] = batches_of,
) -> StageResult:
    """Seal a folder of these shards, targets in plain columns; the first one holds the rejects."""
    packing = packing_of(stage, settings) if stage == "score" else None
    schema = schema_of(stage, settings["vocab_size"], packing)
    version = format_version_of(stage) if packing is None else PACKED_SCORES_VERSION
    identity = Identity(stage, settings, inputs or {}, identity_schema(schema), version)
    assert open_folder(folder, identity) is None
    run = ShardRun(Job(folder, schema, identity, parents or {}, provenance or {}))

    def content(index: int) -> ShardContent:
        made = ShardContent(batches(schema, shards[index]), list(rejects) if index == 0 else [])
        made.add_sums(**sums_of(shards[index]))
        return made

    run.make((index, lambda i=index: content(i)) for index in range(len(shards)))
    assert run.made == len(shards)
    return run.seal()


def in_shards(rows: Sequence[Any], size: int) -> list[Rows]:
    """The rows, so many a shard."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def seal(folder: Path, stage: str, settings: dict[str, Any], shards: list[list[Any]]) -> Path:
    """A folder of records and one reject."""
    seal_shards(
        folder,
        stage,
        settings,
        shards,
        inputs={"chats.jsonl": "0123"},
        provenance={"made": "up"},
        rejects=[Reject("chats.jsonl", 3, "empty: “…”")],
        sums_of=score_sums if stage == "score" else lambda _: {},
    )
    return folder


def folder_of(
    folder: Path,
    rows: Sequence[ScoredExample] | Sequence[TargetExample],
    tokenizer_hash: str = "none",
    shards: int = 1,
    **settings: Any,
) -> Path:
    """A folder of these examples, in so many shards."""
    stage = "build-targets" if isinstance(rows[0], TargetExample) else "score"
    own: dict[str, Any] = {"top_k": 4}
    if stage == "build-targets":
        own = {"method": "gift", "form": "frozen-target", "parameters": {"beta": 20.0}}
        own |= {"residual": "base", "tail_shape": "student", "top_p": 0.99, "max_support": 64}
    common = {"vocab_size": VOCAB_SIZE, "tokenizer_hash": tokenizer_hash}
    parts = [[rows[place] for place in part] for part in np.array_split(range(len(rows)), shards)]
    seal_shards(
        folder,
        stage,
        common | own | settings,
        parts,
        provenance={"model": "made-up"},
        sums_of=lambda part: {"tail_mass": sum(float(row.tail_mass.sum()) for row in part)},
    )
    return folder


def seal_scores(folder: Path) -> Path:
    """Scores of nine demonstrations of 0 to 8 positions, five and four of them in two shards."""
    examples = [random_scored(number) for number in range(9)]
    return seal(folder, "score", SCORES, [examples[:5], examples[5:]])


def build(scores: Path, out: Path, choice: Choice | None = None, **options: Any) -> Path:
    build_targets(BuildSettings(scores, out, choice or choose("gift"), **options))
    return out


def reseal(folder: Path, change: Callable[[Manifest], Manifest] = lambda each: each) -> None:
    """Make every hash, total, sidecar and the seal fit the files; the index is removed."""
    manifest = change(read_manifest(folder))
    entries = [
        replace(
            entry,
            sha256=sha256_of_file(folder / entry.file),
            bytes=(folder / entry.file).stat().st_size,
            fingerprint=manifest.identity.fingerprint,
        )
        for entry in manifest.shards
    ]
    for index, entry in enumerate(entries):
        write_sidecar(folder, index, entry)
    (folder / "rejects.jsonl").write_bytes(rejects_bytes(entries))
    manifest = replace(
        manifest,
        fingerprint=manifest.identity.fingerprint,
        totals=totals_of(entries),
        shards=entries,
        index="",
    )
    (folder / INDEX).unlink(missing_ok=True)
    write_manifest(folder, manifest)


def rewrite(
    folder: Path, index: int, change: Callable[[dict[str, list[Any]]], Any], **types: pa.DataType
) -> None:
    """Change the columns of a shard, as lists of rows."""
    path = folder / f"shard-{index:05d}.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    columns = table.to_pydict()
    change(columns)
    old = {field.name: field.type for field in table.schema}
    fields = [pa.field(name, (old | types)[name]) for name in columns]
    schema = pa.schema(fields)
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
