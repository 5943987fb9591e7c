"""Small sealed folders of scores and targets, written down by hand, and commands run on them."""

import io
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from qpipe.pipeline.folders.manifest import Identity, identity_schema
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import ShardContent
from qpipe.pipeline.format.batches import flatten
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.pipeline.format.schema import format_version_of, schema_of
from qpipe.stages.cli import main

VOCAB_SIZE = 320


def scored(
    name: str,
    ids: Sequence[int],
    supports: Sequence[dict[int, float]],
    first: int | None = None,
    positions: Sequence[int] | None = None,
) -> ScoredExample:
    """Scores of the last tokens of `ids`, one support a token; the observed one stands in each."""
    at = _positions(ids, supports, first, positions)
    probs = [np.array([support[ids[place]] for support, place in zip(supports, at, strict=True)])]
    ordered = [sorted(support.items(), key=lambda item: -item[1]) for support in supports]
    ranks = [
        sum(each >= support[ids[place]] for each in support.values())
        for support, place in zip(supports, at, strict=True)
    ]
    return ScoredExample(
        id=name,
        input_ids=np.array(ids, np.int32),
        positions=np.array(at, np.int32),
        observed_log_probs=np.log(probs[0]).astype(np.float32),
        observed_ranks=np.array(ranks, np.int32),
        counts=np.array([len(support) for support in supports], np.int32),
        topk_ids=np.array([each for rows in ordered for each, _ in rows], np.int32),
        topk_log_probs=np.log([p for rows in ordered for _, p in rows]).astype(np.float32),
        tail_mass=np.array([_tail(support) for support in supports], np.float32),
        token_weights=np.ones(len(at), np.float32),
    )


def targeted(
    name: str,
    ids: Sequence[int],
    trust: Sequence[float],
    supports: Sequence[dict[int, float]],
    weights: Sequence[float] | None = None,
    positions: Sequence[int] | None = None,
) -> TargetExample:
    """Targets of the last tokens of `ids`: γ and the residual of each."""
    at = _positions(ids, supports, None, positions)
    return TargetExample(
        id=name,
        input_ids=np.array(ids, np.int32),
        positions=np.array(at, np.int32),
        trust=np.array(trust, np.float32),
        counts=np.array([len(support) for support in supports], np.int32),
        support_ids=np.array([each for support in supports for each in support], np.int32),
        support_probs=np.array([p for support in supports for p in support.values()], np.float32),
        tail_mass=np.array([_tail(support) for support in supports], np.float32),
        weights=np.array(weights or [1.0] * len(trust), np.float32),
    )


def folder_of(
    folder: Path,
    rows: Sequence[ScoredExample] | Sequence[TargetExample],
    tokenizer_hash: str = "none",
    shards: int = 1,
    **settings: Any,
) -> Path:
    """Seal a folder of these examples."""
    stage = "build-targets" if isinstance(rows[0], TargetExample) else "score"
    own: dict[str, Any] = {"top_k": 4}
    if stage == "build-targets":
        own = {"method": "gift", "form": "frozen-target", "parameters": {"beta": 20.0}}
        own |= {"residual": "base", "tail_shape": "student", "top_p": 0.99, "max_support": 64}
    schema = schema_of(stage, VOCAB_SIZE)
    common = {"vocab_size": VOCAB_SIZE, "tokenizer_hash": tokenizer_hash}
    identity = Identity(
        stage, common | own | settings, {}, identity_schema(schema), format_version_of(stage)
    )
    assert open_folder(folder, identity) is None
    run = ShardRun(Job(folder, schema, identity, {}, {"model": "made-up"}))
    parts = np.array_split(np.arange(len(rows)), shards)

    def content(part: Any) -> ShardContent:
        chosen = [rows[int(place)] for place in part]
        made = ShardContent([flatten(schema, chosen)])
        made.add_sums(tail_mass=sum(float(row.tail_mass.sum()) for row in chosen))
        return made

    tasks = ((index, lambda part=part: content(part)) for index, part in enumerate(parts))
    for _ in run.shards(tasks):
        pass
    run.seal()
    return folder


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str


def run_qpipe(*words: object) -> Ran:
    """Run a command line in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["qpipe", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), errors.getvalue())


def qpipe(*words: object, fails: bool = False) -> str:
    """What a command prints; its error, one line, where it fails."""
    done = run_qpipe(*words)
    assert done.status == (2 if fails else 0), done.err
    return done.err.strip().splitlines()[-1] if fails else done.out


def _positions(
    ids: Sequence[int],
    supports: Sequence[Any],
    first: int | None,
    positions: Sequence[int] | None,
) -> list[int]:
    if positions is not None:
        return list(positions)
    start = len(ids) - len(supports) if first is None else first
    return list(range(start, start + len(supports)))


def _tail(support: dict[int, float]) -> float:
    return max(1 - sum(support.values()), 0.0)


def kill_after_two_shards(out: Path, *words: object) -> int:
    """Kill a command after two shards, in a process of its own; when it wrote the first, in ns."""
    qpipe = Path(sys.executable).with_name("qpipe")
    process = subprocess.Popen([qpipe, *map(str, words)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("shard-*.json"))) < 2:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    return (out / "shard-00000.arrow").stat().st_mtime_ns
