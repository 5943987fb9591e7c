"""`qpipe status` beside real folders: begun, worked in, sealed, trained."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Identity, Plan, identity_schema
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import ShardContent, batches_of
from qpipe.pipeline.format.records import Reject, WeightedExample
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.storage.locks import is_worked_in
from qpipe.stages.cli import cli
from qpipe.stages.engines.base import scored
from qpipe.stages.folders.status import FolderStatus, TrainStatus, status_of
from qpipe.stages.report.training_page import read_runs

SETTINGS = {"vocab_size": 100, "tokenizer_hash": "3fa9", "top_k": 2}
ROWS = 4  # of a shard, and one rejected


def content(index: int) -> ShardContent:
    """Four examples of 3 supervised positions and 10 tokens, and a reject."""
    import numpy as np

    positions = np.array([2, 5, 9], np.int32)
    examples = [
        scored(
            WeightedExample(
                f"{index}-{row}", np.arange(10, dtype=np.int32), positions, np.ones(3, np.float32)
            ),
            np.full(3, -1.0, np.float32),
            np.ones(3, np.int32),
            np.array([[1, 2]] * 3, np.int32),
            np.log(np.array([[0.5, 0.3]] * 3, np.float32)),
            100,
        )
        for row in range(ROWS)
    ]
    return ShardContent(batches_of(schema_of("score", 100), examples), [Reject("c", 1, "no")])


def begin(folder: Path, shards: int, in_all: int | None = 10, **settings: Any) -> ShardRun:
    """A score folder with so many shards, the last made just now, one every ten seconds."""
    schema = schema_of("score", 100)
    identity = Identity("score", SETTINGS | settings, {}, identity_schema(schema))
    demonstrations = None if in_all is None else in_all * (ROWS + 1)
    assert open_folder(folder, Plan(identity, in_all, demonstrations)) is None
    run = ShardRun(Job(folder, schema, identity, {}, {}))
    run.make([(i, lambda i=i: content(i)) for i in range(shards)])
    now = time.time()
    for index in range(shards):
        made = now - 10 * (shards - 1 - index)
        os.utime(folder / f"shard-{index:05d}.json", (made, made))
    return run


@contextmanager
def worked_in(folder: Path) -> Iterator[None]:
    code = (
        "import pathlib, sys; from qpipe.pipeline.storage.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.communicate(b"\n")


def folder_status(folder: Path) -> FolderStatus:
    found = status_of(folder)
    assert isinstance(found, FolderStatus)
    return found


def test_a_folder_under_work_tells_how_far_it_is(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=4)
    with worked_in(tmp_path / "s"):
        found = folder_status(tmp_path / "s")
    assert (found.stage, found.is_done, found.is_worked_in) == ("score", False, True)
    assert (found.shards, found.shards_in_all) == (4, 10)
    assert (found.demonstrations, found.demonstrations_in_all, found.rejected) == (20, 50, 4)
    assert (found.tokens, found.positions) == (160, 48)
    assert found.bytes == sum(p.stat().st_size for p in (tmp_path / "s").glob("shard-*.arrow"))
    assert found.positions_per_second == pytest.approx(36 / 30, rel=1e-3)
    assert found.seconds_left == pytest.approx(30 / (15 / 30), rel=1e-3)
    assert found.seconds_since_shard == pytest.approx(0, abs=5)


def test_a_subset_has_time_left_by_its_shards(tmp_path: Path) -> None:
    """Its plan has the number of demonstrations of the source, many of which are left out."""
    begin(tmp_path / "s", shards=4, subset={"ids": None, "where": []})
    with worked_in(tmp_path / "s"):
        found = folder_status(tmp_path / "s")
    assert (found.demonstrations, found.demonstrations_in_all) == (20, None)
    assert found.seconds_left == pytest.approx(6 * 10, rel=1e-3)


def test_the_speed_is_that_of_the_last_minutes(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=8)
    for index in range(4):  # made long before, by an earlier run
        path = tmp_path / "s" / f"shard-{index:05d}.json"
        os.utime(path, (1e9, 1e9))
    assert folder_status(tmp_path / "s").positions_per_second == pytest.approx(1.2, rel=1e-3)


def test_a_folder_that_nobody_works_in_has_no_time_left(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=4)
    found = folder_status(tmp_path / "s")
    assert (found.is_done, found.is_worked_in, found.seconds_left) == (False, False, None)


@pytest.mark.parametrize("shards", [0, 1])
def test_what_is_not_known_yet_is_none(tmp_path: Path, shards: int) -> None:
    begin(tmp_path / "s", shards, in_all=None)
    found = folder_status(tmp_path / "s")
    assert (found.shards, found.shards_in_all, found.demonstrations_in_all) == (shards, None, None)
    assert (found.positions_per_second, found.seconds_left) == (None, None)
    assert (found.seconds_since_shard is None) == (shards == 0)


def test_a_sealed_folder_is_done(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=3, in_all=3).seal()
    found = folder_status(tmp_path / "s")
    assert (found.is_done, found.shards, found.shards_in_all) == (True, 3, 3)
    assert (found.demonstrations, found.rejected, found.positions) == (15, 3, 36)


def test_nothing_is_written_or_locked(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    status_of(tmp_path / "s")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize("done", [False, True])
def test_a_training_run_tells_its_last_step(tmp_path: Path, done: bool) -> None:
    step = {"event": "step", "step": 7, "loss": 1.25, "tokens_per_second": 99.5}
    lines = [{"event": "step", "step": 6, "loss": 9.0}, step, {"event": "evaluation", "step": 7}]
    text = "".join(json.dumps(each) + "\n" for each in lines) + '{"event": "st'
    (tmp_path / "log.jsonl").write_text("x" * 100_000 + "\n" + text)
    if done:
        (tmp_path / "qpipe.json").write_text("{}")
    found = status_of(tmp_path)
    assert isinstance(found, TrainStatus)
    assert (found.step, found.loss, found.tokens_per_second) == (7, 1.25, 99.5)
    assert found.is_done == done
    assert (found.seconds_since_step is None) == done


def test_a_training_run_without_a_step(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    found = status_of(tmp_path)
    assert isinstance(found, TrainStatus)
    assert found.step is None


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        status_of(tmp_path / "none")
    with pytest.raises(UserError, match="not a qpipe folder"):
        status_of(tmp_path)


def test_a_machine_that_tells_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert is_worked_in(tmp_path) is None


@pytest.mark.parametrize(
    "line", [b"3", b"null", b"[]", b"\xff", b"{}", b'{"event": "step"}', b"[" * 5000]
)
def test_lines_of_a_log_that_hold_no_event_are_passed_over(tmp_path: Path, line: bytes) -> None:
    first = {"event": "step", "step": 1, "loss": 2.5, "tokens": 9}
    last = {"event": "step", "step": 2, "loss": "low", "tokens": None}
    (tmp_path / "log.jsonl").write_bytes(
        json.dumps(first).encode() + b"\n" + line + b"\n" + json.dumps(last).encode() + b"\n" + line
    )
    found = status_of(tmp_path)
    assert isinstance(found, TrainStatus)
    assert (found.step, found.loss) == (2, None)
    (run,) = read_runs([tmp_path])
    assert run.curves == {("step", "loss"): [(1, 2.5)]}
    assert run.tokens == 9


def test_the_command_prints_lines_or_json(tmp_path: Path) -> None:
    begin(tmp_path / "s", shards=4)
    said = CliRunner().invoke(cli, ["status", str(tmp_path / "s")], catch_exceptions=False).output
    assert "not finished, no command is running" in said
    assert "4 of 10 (40.0%)" in said
    assert "48 of 160 tokens" in said
    said = CliRunner().invoke(cli, ["status", str(tmp_path / "s"), "--json"]).output
    assert json.loads(said)["positions"] == 48
