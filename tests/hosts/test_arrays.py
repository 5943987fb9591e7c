"""The tasks of an array on two machines, one of which loses its power."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qpipe.tests.support.s3 import BUCKET, Bucket, lead_to, s3_server

from .conftest import Words, folder_bytes, python, succeed
from .hosts import Host, inside, wait_until

Hosts = tuple[Host, Host]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hosts: Hosts) -> Iterator[Bucket]:
    """A bucket that both machines reach."""
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path / "cache"))
    with inside(hosts[0]), s3_server(hosts[0].address) as address:
        lead_to(address)
        monkeypatch.setenv("NO_PROXY", hosts[0].address)
        yield Bucket(address)


def test_on_a_shared_drive(
    hosts: Hosts, made: Path, score: Words, tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "scores"
    survive(hosts, (*score, out), lambda: len(list(out.glob("shard-*.arrow"))), log)
    assert folder_bytes(out) == folder_bytes(made / "scores")


def test_in_a_bucket(
    hosts: Hosts, made: Path, score: Words, bucket: Bucket, tmp_path: Path, log: Path
) -> None:
    def shards() -> int:
        return sum(name.endswith(".arrow") for name in bucket.names("scores/"))

    survive(hosts, (*score, f"s3://{BUCKET}/scores"), shards, log)
    assert bucket.folder("scores") == folder_bytes(made / "scores")


def test_targets_are_built_by_both(hosts: Hosts, made: Path, tmp_path: Path, log: Path) -> None:
    build = ("build-targets", "--scores", made / "scores", "--out", tmp_path / "targets")
    for task in tasks(hosts, build, log):
        succeed(task, log)
    assert folder_bytes(tmp_path / "targets") == folder_bytes(made / "targets")


def survive(hosts: Hosts, command: Words, shards: Callable[[], int], log: Path) -> None:
    """Run an array; the second machine loses its power, and its task is submitted again."""
    first, second = tasks(hosts, command, log)
    wait_until(lambda: shards() >= 4)
    hosts[1].lose_power()
    assert second.wait(timeout=60) != 0
    assert first.wait(timeout=400) == 0, log.read_text()
    assert shards() < 24  # those of the second are missing
    again = hosts[1].start(*_task(command, 1), log=log)
    succeed(again, log)


def tasks(hosts: Hosts, command: Words, log: Path) -> list[subprocess.Popen[bytes]]:
    return [host.start(*_task(command, number), log=log) for number, host in enumerate(hosts)]


def _task(command: Words, number: int) -> Words:
    return (*python("qpipe.stages"), *command, "--rank", number, "--world-size", 2)
