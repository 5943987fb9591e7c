"""Leases: who may work in a remote folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage import locks
from qpipe.pipeline.storage.locks import Lease, is_worked_in, locked
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.support.s3 import Bucket

HELD = "s3://bucket/held"
LEASE = "held/.lease-0123.tmp"


def lease(**changes: object) -> bytes:
    held = {"kind": "alone", "until": time.time() + 60, "host": "elsewhere", "pid": 1}
    return json.dumps(held | changes).encode()


def test_a_held_folder_is_refused_and_let_go(s3: Bucket) -> None:
    folder = open_path(HELD)
    with locked(folder):
        assert len(s3.names("held/.lease-")) == 1
        with (
            pytest.raises(UserError, match=r"another qpipe works in it.*expires after 120 s"),
            locked(open_path(HELD)),
        ):
            pass
        assert len(s3.names("held/.lease-")) == 1
    assert s3.names() == []
    with locked(folder):
        pass


def test_an_error_lets_go(s3: Bucket) -> None:
    with pytest.raises(KeyboardInterrupt), locked(open_path(HELD)):
        raise KeyboardInterrupt
    assert s3.names() == []


def test_a_living_lease_of_another_machine_holds(s3: Bucket) -> None:
    s3.put(LEASE, lease())
    with pytest.raises(UserError, match="another qpipe works in it"), locked(open_path(HELD)):
        pass
    assert s3.names() == [LEASE]


def ended() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "content",
    [
        lease(until=time.time() - 1),
        lease(host=locks._host(), pid=ended()),
        b"",
        b"[1]",
        b"{}",
        lease(host=locks._host(), pid=10**30),
    ],
    ids=["run out", "of a dead process", "empty", "a list", "no fields", "no process"],
)
def test_what_holds_nobody_off(s3: Bucket, content: bytes) -> None:
    s3.put(LEASE, content)
    with locked(open_path(HELD)):
        pass
    assert s3.names() == [LEASE]


def test_a_living_process_of_this_machine_holds(s3: Bucket) -> None:
    s3.put(LEASE, lease(host=locks._host(), pid=os.getpid()))
    with pytest.raises(UserError, match="another qpipe"), locked(open_path(HELD)):
        pass


@pytest.mark.slow
def test_the_lease_is_renewed(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE", 2.0)
    with locked(open_path(HELD)):
        (name,) = s3.names("held/.lease-")
        first = json.loads(s3.get(name))["until"]
        deadline = time.monotonic() + 30
        while json.loads(s3.get(name))["until"] <= first + 2:
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.1)
        with pytest.raises(UserError), locked(open_path(HELD)):
            pass
    time.sleep(1)
    assert s3.names() == []


def test_tasks_that_come_at_once_all_get_in(s3: Bucket) -> None:
    """Each has seen an empty folder and holds it alone; none then waits for the other."""
    with Lease(open_path(HELD)) as one, Lease(open_path(HELD)) as other:
        s3_names, other._folder = other._folder, open_path("s3://bucket/empty")
        assert one.alone()
        assert other.alone()  # looked before the first one wrote
        other._folder = s3_names
        start = time.monotonic()
        one.share("rank 0 of 2")
        other.share("rank 1 of 2")
        assert time.monotonic() - start < 5
        with pytest.raises(UserError), locked(open_path(HELD)):
            pass


def test_a_lease_that_is_renewed_while_it_is_read_still_holds(s3: Bucket) -> None:
    s3.put(LEASE, lease())
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.is_set():
            s3.put(LEASE, lease(until=time.time() + 100))

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with Lease(open_path(HELD)) as held:
            assert not any(held.alone() for _ in range(50))
    finally:
        is_over.set()
        renewing.join()


def test_a_lease_that_cannot_be_written_is_one_line(s3: Bucket) -> None:
    missing = open_path("s3://missing/held")
    with pytest.raises(UserError, match="bucket does not exist"), locked(missing):
        pass
    with pytest.raises(UserError, match="bucket does not exist"), Lease(missing) as held:
        held._write()


def test_a_lease_that_cannot_be_removed_runs_out(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_path(HELD)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise UserError("out of reach")

    monkeypatch.setattr(type(folder), "unlink", unlink)
    with locked(folder):
        pass
    assert len(s3.names("held/.lease-")) == 1


def test_the_host_is_the_same_in_every_process() -> None:
    code = "from qpipe.pipeline.storage.locks import _host; print(_host())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == locks._host()
    assert socket.gethostname() in locks._host()


@pytest.mark.slow
def test_a_task_that_is_started_twice_is_held_off(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the same rank would make each shard twice, and a sidecar may then be the other's."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    s3.put(LEASE, lease(kind="share", task="rank 1 of 3"))
    with Lease(open_path(HELD)) as other:
        other.share("rank 2 of 3")
    with (
        Lease(open_path(HELD)) as same,
        pytest.raises(UserError, match="another qpipe works in it"),
    ):
        same.share("rank 1 of 3")
    assert s3.names() == [LEASE]


@pytest.mark.slow
def test_a_task_waits_for_the_end_of_a_killed_one_of_the_same_rank(s3: Bucket) -> None:
    s3.put(LEASE, lease(kind="share", task="rank 1 of 3", until=time.time() + 2))
    with Lease(open_path(HELD)) as again:
        again.share("rank 1 of 3")
        assert len(s3.names("held/.lease-")) == 2


@pytest.mark.slow
def test_two_starts_of_a_task_that_did_not_see_each_other_both_go_on(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write the same; to wait for each other would end both."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    s3.put(LEASE, lease(kind="share", task="rank 1 of 3"))
    with Lease(open_path(HELD)) as one:
        one.share("rank 0 of 3")
        s3.put("held/.lease-twin.tmp", lease(kind="share", task="rank 0 of 3"))
        one.share("rank 0 of 3")


def test_a_remote_folder_is_worked_in_while_a_lease_holds(s3: Bucket) -> None:
    folder = open_path(HELD)
    with locked(folder):
        assert is_worked_in(folder)
    s3.put(LEASE, lease(until=time.time() - 1))
    assert not is_worked_in(folder)
