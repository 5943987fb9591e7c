"""Small sealed folders made by hand, and hands that change them and make every hash fit again."""

from collections.abc import Callable
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
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder, rejects_bytes
from qpipe.pipeline.folders.shards import ShardContent, batches_of, write_sidecar
from qpipe.pipeline.format.records import Reject, ScoredExample, TargetExample
from qpipe.pipeline.format.schema import format_version_of, schema_of
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.storage.files import sha256_of_file
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.score.stage import score_sums

VOCAB, TOP_K = 300, 12
SCORES = {"vocab_size": VOCAB, "top_k": TOP_K, "tokenizer_hash": "3fa9"}


def scored(number: int) -> ScoredExample:
    """A demonstration of `number` positions under a random model."""
    rng = np.random.default_rng(number)
    tokens = number + 2
    logits = 2 * rng.standard_normal((number, VOCAB))
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logs, axis=1)
    top, rest = order[:, :TOP_K], order[:, TOP_K:]
    input_ids = rng.integers(0, VOCAB, tokens).astype(np.int32)
    positions = np.arange(2, tokens, dtype=np.int32)
    observed = np.take_along_axis(logs, input_ids[positions][:, None], axis=1)
    return ScoredExample(
        id=f"chats:{number}",
        input_ids=input_ids,
        positions=positions,
        observed_log_probs=observed[:, 0].astype(np.float32),
        observed_ranks=(logs >= observed).sum(axis=1).astype(np.int32),
        counts=np.full(number, TOP_K, np.int32),
        topk_ids=top.ravel().astype(np.int32),
        topk_log_probs=np.take_along_axis(logs, top, axis=1).ravel().astype(np.float32),
        tail_mass=np.exp(np.take_along_axis(logs, rest, axis=1)).sum(axis=1).astype(np.float32),
        token_weights=np.ones(number, np.float32),
    )


def seal(folder: Path, stage: str, settings: dict[str, Any], shards: list[list[Any]]) -> Path:
    """A folder of records, plain columns, one reject."""
    schema = schema_of(stage, settings["vocab_size"])
    version = format_version_of(stage)
    made = Identity(stage, settings, {"chats.jsonl": "0123"}, identity_schema(schema), version)
    assert open_folder(folder, made) is None
    run = ShardRun(Job(folder, schema, made, {}, {"made": "up"}))

    def content(index: int) -> ShardContent:
        rejects = [Reject("chats.jsonl", 3, "empty: “…”")] if index == 0 else []
        made = ShardContent(batches_of(schema, shards[index]), rejects)
        if stage == "score":
            made.add_sums(**score_sums(shards[index]))
        return made

    for _ in run.shards((index, lambda i=index: content(i)) for index in range(len(shards))):
        pass
    run.seal()
    return folder


def seal_scores(folder: Path) -> Path:
    """Scores of nine demonstrations of 0 to 8 positions, five and four of them in two shards."""
    examples = [scored(number) for number in range(9)]
    return seal(folder, "score", SCORES, [examples[:5], examples[5:]])


def build(scores: Path, out: Path, choice: Choice | None = None, **options: Any) -> Path:
    build_targets(BuildSettings(scores, out, choice or choose("gift"), **options))
    return out


def reseal(folder: Path, change: Callable[[Manifest], Manifest] = lambda each: each) -> None:
    """Make every hash, total, sidecar and the seal fit what the folder holds now."""
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
    )
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


def as_targets(example: ScoredExample) -> TargetExample:
    """The example's own tokens as targets."""
    n = len(example.positions)
    return TargetExample(
        id=example.id,
        input_ids=example.input_ids,
        positions=example.positions,
        trust=np.full(n, 0.5, np.float32),
        counts=np.ones(n, np.int32),
        support_ids=example.observed_ids,
        support_probs=np.full(n, 0.75, np.float32),
        tail_mass=np.full(n, 0.25, np.float32),
        weights=np.ones(n, np.float32),
    )
