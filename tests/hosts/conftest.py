"""Fixtures of the tests on two machines, and what they write compared with that of one process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qpipe.tests.support.commands import qpipe

from .hosts import Host, are_possible, two_hosts

Words = tuple[object, ...]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All are slow, and skipped where namespaces cannot be made."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = "two machines take root and `ip netns`"
    unable = pytest.mark.skipif(bool(here) and not are_possible(), reason=reason)
    for item in here:
        item.add_marker(pytest.mark.slow)
        item.add_marker(unable)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="session")
def score(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Words:
    """A command of 24 shards, one row rejected, that lacks --out."""
    rows: list[object] = [
        {"prompt": f"Say {n}.", "completion": f"The answer is {n}. " * (1 + n % 7)}
        for n in range(191)
    ]
    rows.insert(40, {"text": "no known form"})
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("score", "--model", tiny_model, "--demonstrations", file, "--engine", "transformers",
            "--top-k", 8, "--shard-size", 8, "--out")  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, score: Words) -> Path:
    """scores/ and targets/, by one process each. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    qpipe(*score, root / "scores")
    qpipe("build-targets", "--scores", root / "scores", "--out", root / "targets")
    return root


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where all commands of a test write what they say."""
    return tmp_path / "log"


def python(*words: object) -> Words:
    """A module run by this interpreter."""
    return (sys.executable, "-m", *words)


def succeed(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command to end well."""
    assert process.wait(timeout=400) == 0, log.read_text()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
