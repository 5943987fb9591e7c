"""Random ragged records, and a toy stage that makes folders of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.folders.manifest import Identity, identity_schema
from qpipe.pipeline.folders.shard_run import Job, ShardRun, StageResult, open_folder
from qpipe.pipeline.folders.shards import ShardContent, batches_of
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.format.schema import Schema, schema_of


def random_record(
    schema: Schema, rng: np.random.Generator, name: str, tokens: int, positions: int, largest: int
) -> Any:
    """A record of this many tokens and positions, 1 to 5 entries at each; `largest` is among its
    token ids."""
    counts = rng.integers(1, 6, positions).astype(np.int32)
    sizes = {"token": tokens, "position": positions, "entry": int(counts.sum())}
    values: dict[str, Any] = {}
    for column in schema.lists:
        size = sizes[column.level]
        if column.dtype is np.float32:
            values[column.name] = rng.standard_normal(size).astype(np.float32)
        else:
            values[column.name] = rng.integers(0, largest, size, endpoint=True).astype(np.int32)
    values["input_ids"][-1:] = largest
    values["counts"] = counts
    chosen = rng.choice(np.arange(1, max(tokens, 1)), positions, replace=False)
    values["positions"] = np.sort(chosen).astype(np.int32)
    return schema.record(id=name, **values)


@dataclass
class Toy:
    """A stage that needs no engine: three shards of two demonstrations, one of the six rejected."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)  # the shards made
    fail_at: int | None = None
    shard_count: int = 3

    @property
    def schema(self) -> Schema:
        return schema_of("score", 100)

    @property
    def job(self) -> Job:
        identity = Identity(
            stage="score",
            settings={"vocab_size": 100, "top_k": 5, "tokenizer_hash": "3fa9"} | self.settings,
            inputs={"chats.jsonl": "0123"},
            schema=identity_schema(self.schema),
        )
        provenance = {"model": "toy"}
        return Job(self.folder, self.schema, identity, parents={}, provenance=provenance)

    def records(self, index: int) -> list[Any]:
        """Shard i has two records of 8 and 9 tokens; shard 1 has only the first."""
        rng = np.random.default_rng(index)
        return [
            random_record(self.schema, rng, f"{index}-{row}", 8 + row, 3 + row, largest=99)
            for row in range(1 if index == 1 else 2)
        ]

    def content(self, index: int) -> ShardContent:
        self.calls.append(index)
        if index == self.fail_at:
            raise KeyboardInterrupt
        content = ShardContent(batches_of(self.schema, self.records(index)))
        content.add_sums(nll=0.5 + index)
        if index == 1:
            content.rejects.append(Reject("chats.jsonl", 4, "no assistant turn: “…”"))
        return content

    def run(self) -> StageResult:
        job = self.job
        done = open_folder(self.folder, job.identity)
        if done is not None:
            return done
        run = ShardRun(job)
        tasks = [(index, partial(self.content, index)) for index in range(self.shard_count)]
        run.make(tasks)
        return run.seal()


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Any]:
    return random_record


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the toy makes its folder."""
    return tmp_path / "scores"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's folder, made in one go. Not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "scores"
    Toy(folder).run()
    return folder


@pytest.fixture(scope="session")
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """What a folder holds: every file's name and content."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return read
