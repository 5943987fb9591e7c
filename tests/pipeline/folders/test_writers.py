"""Two commands that write one folder at the same moment, where locks have no effect.

As on NFS and in buckets: with different settings one of them makes the folder, and the other one
stops with a line.
"""

import errno
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from shutil import rmtree

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest, seal
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shard_run import open_folder
from qpipe.pipeline.storage.files import create_bytes
from qpipe.pipeline.storage.locks import locks_work
from qpipe.pipeline.storage.remote import open_path

from ...support.s3 import Bucket
from ...support.tiers import slow
from ..conftest import Toy

WRITER = """
import fcntl, sys, time
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.pipeline.conftest import Toy

fcntl.flock = lambda *_: None  # as on a file system without locks
folder, top_k, start = sys.argv[1:]
toy = Toy(open_path(folder), settings={"top_k": int(top_k)}, shard_count=8)
time.sleep(max(0, float(start) - time.time()))
try:
    toy.run()
except UserError as error:
    print(error)
    sys.exit(2)
"""


def write_at_once(folder: str, *top_k: int) -> dict[int, tuple[int, str]]:
    """The exit status and output of a writer for each setting."""
    start = time.time() + 2
    writers = {
        each: subprocess.Popen(
            [sys.executable, "-c", WRITER, folder, str(each), str(start + 0.003 * number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, each in enumerate(top_k)
    }
    said = {each: writer.communicate(timeout=60)[0] for each, writer in writers.items()}
    return {each: (writer.returncode, said[each]) for each, writer in writers.items()}


def judge(folder: Path, ends: dict[int, tuple[int, str]]) -> None:
    """One setting made the whole folder; the writers of others say so."""
    sealed = open_sealed(folder)
    winner = sealed.settings["top_k"]
    for setting, (status, said) in ends.items():
        assert status == (0 if setting == winner else 2), ends
        if status:
            assert f"top_k is {winner} there and {setting} now" in said
            assert said.count("\n") == 1
    assert len(sealed.manifest.shards) == 8
    for shard in sealed.shards:
        assert list(sealed.batches(shard))  # compares the hash


@pytest.mark.parametrize("rounds", [1, *slow(12)])
def test_of_different_settings_one_makes_the_folder(tmp_path: Path, rounds: int) -> None:
    for number in range(rounds):
        folder = tmp_path / str(number)
        judge(folder, write_at_once(str(folder), 5, 6, 7))


@pytest.mark.parametrize("rounds", [1, *slow(6)])
def test_in_a_bucket(s3: Bucket, rounds: int) -> None:
    for number in range(rounds):
        url = f"s3://bucket/{number}"
        judge(open_path(url), write_at_once(url, 5, 6))


def test_a_plan_is_replaced_only_where_locks_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the writer of the plan may be at work."""
    open_folder(folder, Toy(folder, settings={"top_k": 99}).job.identity)
    assert locks_work(folder)
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *_: None)
        assert not locks_work(folder)
        with pytest.raises(UserError, match="top_k is 99 there and 5 now"):
            Toy(folder).run()
    Toy(folder).run()
    assert read_manifest(folder).settings["top_k"] == 5


def test_a_manifest_of_other_shards_is_not_replaced(folder: Path) -> None:
    manifest = Toy(folder).run().manifest
    sealed = (folder / "manifest.json").read_bytes()
    assert seal(folder, manifest) == manifest
    changed = type(manifest)(
        manifest.identity,
        manifest.fingerprint,
        manifest.parents,
        manifest.provenance,
        manifest.totals,
        manifest.shards[:-1],
    )
    with pytest.raises(UserError, match="another command sealed it meanwhile with other shards"):
        seal(folder, changed)
    assert (folder / "manifest.json").read_bytes() == sealed


def test_a_file_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    assert create_bytes(path, b"first")
    assert not create_bytes(path, b"second")

    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", no_links)
        assert not create_bytes(path, b"second")
        assert create_bytes(tmp_path / "other", b"other")
        with monkeypatch.context() as failing:
            failing.setattr("os.fsync", fails_at(2))
            with pytest.raises(UserError, match="third: cannot be written: Input/output error"):
                create_bytes(tmp_path / "third", b"third")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {
        "plan.json": b"first",
        "other": b"other",
    }


def fails_at(number: int) -> Callable[[int], None]:
    """A sync that fails when it is called for the nth time, and from then on."""
    calls = count(1)

    def sync(_: int) -> None:
        if next(calls) >= number:
            raise OSError(errno.EIO, "Input/output error")

    return sync


def test_a_sync_that_fails_is_one_line_and_the_next_run_goes_on(
    folder: Path, undisturbed: Path, folder_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    failures = 0
    for number in count(1):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fails_at(number))
            try:
                Toy(folder).run()
                break
            except UserError as error:
                said = str(error)
        failures += 1
        assert "Input/output error" in said
        assert said.startswith(str(folder))
        Toy(folder).run()
        assert folder_bytes(folder) == folder_bytes(undisturbed)
        rmtree(folder)
    assert failures > 10
