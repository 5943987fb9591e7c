"""`--store`: folders that are named by what they hold, and made once for all."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.storage.locks import locked
from qpipe.stages.cli import cli

from ...support.folders import seal_scores


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return seal_scores(tmp_path / "scores")


def test_whoever_asks_for_the_same_gets_the_same_folder(scores: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ("build-targets", "--scores", scores, "--store", store)

    first, again, other = run(*command), run(*command), run(*command, "--method", "gift")

    assert [each.exit_code for each in (first, again, other)] == [0, 0, 0]
    assert "was there already" not in first.output
    assert "was there already" in again.output
    assert "was there already" not in other.output
    folders = sorted(store.iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name == f"build-targets-{read_manifest(folder).fingerprint[:16]}"
        assert str(folder) in first.output + other.output
    listed = [json.loads(line) for line in run("list", store, "--json").output.splitlines()]
    assert [each["folder"] for each in listed] == [folder.name for folder in folders]


def test_what_is_there_is_had_at_once_whoever_holds_it(scores: Path, tmp_path: Path) -> None:
    command = ("build-targets", "--scores", scores, "--store", tmp_path / "store")
    run(*command)
    (folder,) = (tmp_path / "store").iterdir()
    with locked(folder):
        done = run(*command)
    assert done.exit_code == 0
    assert "was there already" in done.output


def test_a_half_made_folder_of_a_store_is_continued(scores: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ("build-targets", "--scores", scores, "--store", store)
    run(*command)
    (folder,) = store.iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "plan.json").write_text(json.dumps(manifest["identity"]))
    for name in ("manifest.json", "shard-00000.arrow", "shard-00000.json"):
        (folder / name).unlink()

    assert run(*command).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize("places", [(), ("--out", "a", "--store", "b")])
def test_a_folder_goes_to_one_place(scores: Path, places: tuple[str, ...]) -> None:
    done = run("build-targets", "--scores", scores, *places)
    assert done.exit_code == 2
    assert "give either --out DIR or --store ROOT" in done.output
