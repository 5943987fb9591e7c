"""`qpipe share` to a hub that speaks the Hugging Face hub's protocol, on loopback."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of
from qpipe.tests.support.hub import hub_server

# in a process of its own: the hub's address is read when its library is imported
SCRIPT = """
import sys
from qpipe.tests.support.commands import (qpipe)
for line in sys.stdin.read().splitlines():
    fails, *words = line.split("|")
    print(qpipe(*words, fails=bool(fails)).strip())
"""
Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with hub_server() as address:
        yield address


@pytest.fixture
def run(address: str, tmp_path: Path) -> Run:
    """Runs commands on the hub; gives what each prints, its error where it is marked with !."""

    def run(*commands: str) -> list[str]:
        lines = [f"!|{each[1:]}" if each[0] == "!" else f"|{each}" for each in commands]
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_token",
            "QPIPE_CACHE": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input="\n".join(lines),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rows = [targeted(f"row {n}", [1, 2, n], [0.5], [{n: 0.5, 9: 0.25}]) for n in range(3, 7)]
    return folder_of(tmp_path / "made", rows, shards=2)


def log(address: str, of: str) -> list[str]:
    """What the hub was asked to do since it made a repository."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address}/log") as answer:
        lines: list[str] = json.load(answer)
    return lines[lines.index(f"create me/{of} private") + 1 :]


def test_a_folder_appears_there_in_one_commit(run: Run, made: Path, address: str) -> None:
    url = "hf://datasets/me/targets/code"
    said = run(f"share|{made}|{url}", f"verify|{url}", f"share|{made}|{url}", f"list|{url[:-5]}")
    assert "2 shard(s) copied: 4 demonstrations" in said[0]
    assert "all well: 4 demonstrations" in said[1]
    assert "was there already" in said[2]
    assert said[4].split()[:2] == ["code", "build-targets"]
    uploads = [line for line in log(address, "targets") if not line.startswith("create")]
    assert [line.split()[0] for line in uploads] == ["upload", "upload", "upload", "commit"]
    assert uploads[3] == "commit 8 files"  # shards, sidecars, index, rejects, card, manifest


def test_what_was_uploaded_is_not_uploaded_again(run: Run, made: Path, address: str) -> None:
    share = f"share|{made}|hf://datasets/me/busy"
    refused, done = run(f"!{share}", share)
    assert "hf://datasets/me/busy: cannot be written: " in refused
    assert refused.endswith("run the same command again")
    assert "2 shard(s) copied" in done
    assert [line.split()[0] for line in log(address, "busy")][-2:] == ["create", "commit"]


def test_another_folders_place_is_refused(run: Run, made: Path, tmp_path: Path) -> None:
    other = folder_of(tmp_path / "other", [targeted("a", [1, 2], [0.5], [{2: 0.5}])])
    url = "hf://datasets/me/taken"
    _, apart, inside = run(f"share|{made}|{url}", f"!share|{other}|{url}", f"!share|{other}|{url}/")
    assert apart == inside
    assert "already holds" in apart or "made another time" in apart
