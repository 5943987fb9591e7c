"""`qpipe list`: what lies under a root, whatever else lies there."""

import json
import re
from pathlib import Path

import pytest
from qpipe.pipeline.folders.manifest import MANIFEST, PLAN, read_manifest
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of
from qpipe.tests.support.s3 import Bucket


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, s3: Bucket, tmp_path: Path) -> str:
    """Scores, targets, targets half made, a damaged manifest, and what is none of ours."""
    here = tmp_path / "root"
    folder_of(here / "a", [scored("x", [1, 2, 3], [{3: 0.5}])])
    folder_of(here / "b", [targeted("x", [1, 2, 3], [0.5, 0.5], [{2: 0.5}, {3: 0.5}])])
    folder_of(here / "half", [targeted("x", [1, 2], [0.5], [{2: 0.5}])], beta_of="half")
    manifest = json.loads((here / "half" / MANIFEST).read_text())
    (here / "half" / MANIFEST).unlink()
    (here / "half" / PLAN).write_text(json.dumps(manifest["identity"]))
    for name, content in (("broken", b"{"), ("changed", b'{"identity": {}}')):
        (here / name).mkdir()
        (here / name / MANIFEST).write_bytes(content)
    (here / "foreign").mkdir()
    (here / "foreign" / "note.txt").write_bytes(b"mine")
    (here / "file.txt").write_bytes(b"mine")
    (here / "empty").mkdir()
    if request.param == "local":
        return str(here)
    for path in here.rglob("*"):
        if path.is_file():
            s3.put(f"root/{path.relative_to(here)}", path.read_bytes())
    return "s3://bucket/root"


def test_a_line_for_each_folder(root: str) -> None:
    head, *lines = (re.split(r" {2,}", line) for line in qpipe("list", root).splitlines())
    assert head == ["folder", "stage", "model", "made", "demos", "tokens", "B/token", "from", "age"]
    assert [line[:2] for line in lines] == [
        ["a", "score"],
        ["b", "build-targets"],
        ["broken", "damaged"],
        ["changed", "damaged"],
        ["half", "build-targets, not finished"],
    ]
    size = (open_path(root) / "b" / "shard-00000.arrow").stat().st_size
    assert lines[1][2:6] == ["made-up", "gift (frozen-target, beta=20)", "1", "2"]
    assert lines[1][6] == f"{size / 2:.1f}"
    assert re.fullmatch(r"\d+ (s|min)", lines[1][7])
    assert "not JSON" in lines[2][2]


def test_filters_and_json(root: str) -> None:
    found = [json.loads(line) for line in qpipe("list", root, "--json").splitlines()]
    assert [each["folder"] for each in found] == ["a", "b", "broken", "changed", "half"]
    manifest = read_manifest(open_path(f"{root}/a"))
    assert found[0]["fingerprint"] == manifest.fingerprint
    assert (found[0]["rows"], found[0]["positions"], found[0]["is_sealed"]) == (1, 1, True)
    assert (found[4]["rows"], found[4]["is_sealed"], found[4]["error"]) == (None, False, None)
    assert "not JSON" in found[2]["error"]
    stages = qpipe("list", root, "--json", "--stage", "score").splitlines()
    assert [json.loads(line)["folder"] for line in stages] == ["a"]
    texts = qpipe("list", root, "--json", "--contains", "gift").splitlines()
    assert [json.loads(line)["folder"] for line in texts] == ["b", "half"]


def test_what_others_sealed_cannot_end_it(tmp_path: Path) -> None:
    """Whole in every hash, and yet nothing that this package writes."""
    from msgspec.structs import replace
    from qpipe.pipeline.folders.manifest import write_manifest

    folder = folder_of(tmp_path / "a", [targeted("x", [1, 2], [0.5], [{2: 0.5}])])
    manifest = read_manifest(folder)
    settings = {"vocab_size": 320, "tokenizer_hash": ""}
    identity = replace(manifest.identity, settings=settings)
    provenance = {"model": "m\n\x1b[2Jfake  line"}
    for name, each in (("b", identity), ("c", manifest.identity)):
        (tmp_path / name).mkdir()
        written = replace(
            manifest, identity=each, fingerprint=each.fingerprint, provenance=provenance
        )
        write_manifest(tmp_path / name, written)
    said = qpipe("list", tmp_path)
    assert len(said.splitlines()) == 4
    assert "\x1b" not in said
    assert re.search(r"^b +damaged .*\(setting method is missing\): ", said, re.MULTILINE)


@pytest.mark.parametrize("root", ["{}/nowhere", "s3://bucket/nowhere", "s3://missing/root"])
def test_a_root_that_is_none(s3: Bucket, tmp_path: Path, root: str) -> None:
    root = root.format(tmp_path)
    assert qpipe("list", root, fails=True).startswith(f"Error: {root}: no such folder")
