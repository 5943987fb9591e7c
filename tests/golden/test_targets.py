"""Scores and targets are, byte for byte, those that were pinned.

The bytes also depend on the processor's exp and log and on pyarrow's zstd. On a machine whose
`arithmetic()` is not pinned, the content of the scores, the names of the files and the bytes of two
builds are compared.
"""

import hashlib
from dataclasses import fields
from pathlib import Path

import pytest
from qpipe.pipeline import read_scores
from qpipe.tests.golden.pinned import arithmetic, hashes_of
from qpipe.tests.golden.targets import build_all, read_golden
from qpipe.tests.support.commands import qpipe

Hashes = dict[str, dict[str, str]]
CONTENT = {"scores": "bf99800a117a348a", "teacher": "01e2d23e679c0ca3"}  # the same on every machine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def built(root: Path) -> Hashes:
    return build_all(root)


@pytest.mark.parametrize("name", CONTENT)
def test_scores_are_read_as_they_were_made(root: Path, built: Hashes, name: str) -> None:
    digest = hashlib.sha256()
    for example in read_scores(root / name):
        for field in fields(example):
            value = getattr(example, field.name)
            digest.update(value.encode() if field.name == "id" else value.tobytes())
    assert digest.hexdigest()[:16] == CONTENT[name]


def test_every_folder_is_sealed_and_pinned(built: Hashes) -> None:
    files = {name: list(hashes) for name, hashes in built.items()}
    for pinned in read_golden().values():
        assert files == {name: list(hashes) for name, hashes in pinned.items()}


def test_every_file_is_the_one_that_was_pinned(built: Hashes) -> None:
    pinned = read_golden().get(arithmetic())
    if pinned is None:
        pytest.skip(f"no bytes are pinned for the arithmetic of this machine: {arithmetic()}")
    changed = [
        f"{name}/{file}"
        for name, hashes in built.items()
        for file, found in hashes.items()
        if found != pinned[name][file]
    ]
    assert changed == []


def test_a_second_build_gives_the_same_bytes(root: Path, built: Hashes) -> None:
    scores, again = root / "scores", root.with_name(f"{root.name} again")
    words = ("--method", "gift", "--form", "frozen-target")
    qpipe("build-targets", "--scores", scores, "--out", again, *words)
    assert hashes_of(again) == built["gift frozen-target"]
    assert hashes_of(again) != built["gift live"]
