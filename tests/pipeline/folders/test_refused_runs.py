"""Folders that a run over shards refuses: made differently, damaged, larger than can be read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Plan, ShardEntry, read_manifest, shard_name
from qpipe.pipeline.folders.shard_run import MOST_SHARDS, open_folder
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.files import MOST_BYTES
from qpipe.pipeline.storage.json_files import json_bytes
from qpipe.pipeline.storage.locks import locked

from .stopped import FILES, FolderBytes, stop_at


@pytest.mark.parametrize("sealed", [True, False])
def test_another_setting_is_refused_with_the_field_and_both_values(
    toy: Any, folder: Path, folder_bytes: FolderBytes, sealed: bool
) -> None:
    if sealed:
        toy(folder).run()
    else:
        stop_at(toy, folder, 2)
    before = folder_bytes(folder)
    other = toy(folder, settings={"top_k": 7})

    with pytest.raises(UserError) as refused:
        other.run()

    assert str(folder) in str(refused.value)
    assert "settings.top_k is 5 there and 7 now" in str(refused.value)
    assert other.calls == []
    assert folder_bytes(folder) == before


def test_a_folder_of_another_stage_is_refused(toy: Any, undisturbed: Path) -> None:
    identity = replace(toy(undisturbed).job.identity, stage="build-targets")

    with pytest.raises(UserError, match="already holds `qpipe score` output made differently"):
        open_folder(undisturbed, identity)


@pytest.mark.parametrize(
    "name", ["notes.txt", "chats.jsonl", ".hidden", "shard-00000.arrow", "rejects.jsonl", "sub"]
)
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    toy: Any, folder: Path, name: str
) -> None:
    folder.mkdir()
    if name == "sub":
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    stage = toy(folder)

    with pytest.raises(UserError, match=f"holds something else \\({name}\\)"):
        stage.run()

    assert [path.name for path in folder.iterdir()] == [name]
    assert name == "sub" or (folder / name).read_text() == "mine"
    assert stage.calls == []


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_alone(
    toy: Any, folder: Path
) -> None:
    folder.write_text("mine")

    with pytest.raises(UserError, match="cannot be used for output: File exists"):
        toy(folder).run()

    assert folder.read_text() == "mine"


def test_a_folder_inside_a_file_is_refused(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="scores: cannot be used for output: Not a directory"):
        toy(tmp_path / "file" / "scores").run()


def test_an_empty_folder_is_used(toy: Any, folder: Path) -> None:
    folder.mkdir()
    toy(folder).run()

    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"plan"', '{"stage": "score"}'])
def test_a_damaged_plan_is_refused_by_name(toy: Any, folder: Path, text: str) -> None:
    stop_at(toy, folder, 1)
    (folder / "plan.json").write_text(text)

    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        toy(folder).run()
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": []},
        {"counts": {"shards": "3"}},
        {"counts": {"demonstrations": -1}},
        {"counts": {"more": 1}},
        {"stage": ["score"]},
        {"settings": []},
        {"inputs": None},
        {"settings": {"a": "\ud800"}},
    ],
    ids=str,
)
def test_a_plan_of_another_shape_is_refused_by_name(
    toy: Any, folder: Path, change: dict[str, Any]
) -> None:
    stop_at(toy, folder, 1)
    plan = folder / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))

    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        toy(folder).run()
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_sidecar_stops_the_run_by_name(toy: Any, folder: Path, text: str) -> None:
    stop_at(toy, folder, 1)
    (folder / "shard-00000.json").write_text(text)

    with pytest.raises(UserError, match=r"shard-00000\.json: damaged"):
        toy(folder).run()


def test_a_copy_of_a_sidecar_is_no_crash(toy: Any, folder: Path) -> None:
    stop_at(toy, folder, 1)
    (folder / "shard-00000 (copy).json").write_bytes((folder / "shard-00000.json").read_bytes())
    try:
        toy(folder).run()
    except UserError as error:
        assert "(copy)" in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_manifest_stops_the_run_and_is_left_alone(
    toy: Any, folder: Path, text: str
) -> None:
    toy(folder).run()
    (folder / "manifest.json").write_text(text)

    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        toy(folder).run()

    assert (folder / "manifest.json").read_text() == text


def test_more_rejects_than_a_manifest_can_hold_end_the_run(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rejecting(toy):
        def content(self, index: int) -> Any:
            content = super().content(index)
            content.rejects = [Reject("chats.jsonl", 1, "too long")] * 4
            return content

    of_four = len(json_bytes([asdict(Reject("chats.jsonl", 1, "too long"))] * 4))
    monkeypatch.setattr("qpipe.pipeline.folders.shard_run.MOST_OF_REJECTS", 2 * of_four - 1)
    with pytest.raises(UserError, match=f"cannot be used.* take {2 * of_four:,} bytes; .*is the m"):
        Rejecting(folder, shard_count=9).run()
    again = Rejecting(folder, shard_count=9)
    with pytest.raises(UserError, match="demonstrations cannot be used"):
        again.run()
    assert again.calls == []


def test_a_manifest_too_large_to_be_read_is_not_written(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.pipeline.storage.json_files.MOST_BYTES", 2000)
    with pytest.raises(UserError, match=r"manifest.json: would have [\d,]+ bytes, more than is"):
        toy(folder).run()
    assert not (folder / "manifest.json").exists()


def test_reasons_that_no_reader_would_take_are_refused_as_their_shard_is_written(
    toy: Any, folder: Path
) -> None:
    """Full of commas: they count as values where a file is read."""

    class Rejecting(toy):
        def content(self, index: int) -> Any:
            content = super().content(index)
            content.rejects = [Reject("chats.jsonl", 1, "," * 300)] * 1000
            return content

    with pytest.raises(UserError, match=r"shard-00000.json: would have 3\d\d,\d+ values in"):
        Rejecting(folder).run()
    assert [*folder.glob("shard-*.json")] == []


def test_more_shards_than_a_manifest_can_hold_are_refused_before_the_work(
    toy: Any, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"150,001 shards, 150,000 is the most.*--shard-size"):
        open_folder(folder, Plan(toy(folder).job.identity, shards=150_001))
    assert not folder.exists()


def test_a_manifest_of_the_most_shards_can_be_read() -> None:
    """A target folder's says the most of each shard: 28 sums."""
    sums = {f"ceiling.divergence.{number}": -1234567.123456789 for number in range(28)}
    entry = ShardEntry(shard_name(99_999), "0" * 64, *[10**9] * 5, "0" * 64, [], sums)
    assert MOST_SHARDS * len(json_bytes([asdict(entry)])) < MOST_BYTES


def test_a_folder_that_another_process_works_in_is_refused(folder: Path) -> None:
    with locked(folder):
        code = "import sys, pathlib; from qpipe.pipeline.storage.locks import locked\n"
        code += "with locked(pathlib.Path(sys.argv[1])): pass"
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
        )
        assert f"{folder}: another qpipe works in it" in done.stderr
    with locked(folder):
        pass
