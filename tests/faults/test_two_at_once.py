"""Two commands started on the same output folder by mistake: one works, the other says so."""

import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.s3 import BUCKET, Bucket
from qpipe.tests.support.tiers import slow

BUSY = "another qpipe works in it: wait for it, or give another --out"


def test_the_second_is_refused_and_the_first_goes_on(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = work.start(out)
    while not (out / "plan.json").exists():
        time.sleep(0.001)
    first.signal(signal.SIGSTOP)  # so that it is still there when the second one comes
    second = work.strike(out, fault="clock back", at=0)
    assert second.wait() == 2, second.said
    assert second.error == f"Error: {out}: {BUSY}"
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.said
    work.judge(out)


@pytest.mark.parametrize("rounds", [1, *slow(15)])
def test_three_that_start_at_the_same_moment(work: Work, tmp_path: Path, rounds: int) -> None:
    """One of them makes the folder; the others are refused, or come when it is done."""
    rng = random.Random(rounds)
    for number in range(rounds):
        out = tmp_path / str(number)
        commands = []
        for _ in range(3):
            commands.append(work.start(out))
            time.sleep(rng.uniform(0, 0.02))
        work.count("other faults", 2)
        ends = [command.wait() for command in commands]
        assert set(ends) <= {0, 2}, [command.said for command in commands]
        assert 0 in ends
        for end, command in zip(ends, commands, strict=True):
            assert end == 0 or command.error == f"Error: {out}: {BUSY}"
        work.judge(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "build-targets"])
def test_the_same_task_twice(works: Mapping[str, Work], name: str, tmp_path: Path) -> None:
    """Tasks share a folder by intent; what one of them is making the others leave alone."""
    work = works[name]
    for number in range(6):
        out = tmp_path / str(number)
        commands = [work.start(out, "--rank", rank, "--world-size", 2) for rank in (0, 0, 1, 1)]
        work.count("other faults", 2)
        assert [command.wait() for command in commands] == [0] * 4
        again = work.start(out)  # a task may have left what another was making just then
        assert again.wait() == 0, again.said
        work.judge(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "build-targets"])
def test_a_writer_in_a_bucket_that_stands_still_for_longer_than_its_lease(
    works: Mapping[str, Work], s3: Bucket, name: str, tmp_path: Path
) -> None:
    """Another makes the folder; the first, when it goes on, adds nothing and changes nothing."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    work = replace(works[name], environment=environment | {"NO_PROXY": "127.0.0.1"})
    out = f"s3://{BUCKET}/{name}"
    first = work.start(out)
    while first.is_running and len(s3.names(name)) < 3:
        time.sleep(0.01)
    first.signal(signal.SIGSTOP)
    busy = work.start(out)
    assert busy.wait() == 2, busy.said
    assert "another qpipe works in it: wait for it (the lease of" in busy.error
    second = work.strike(out, "clock forward", 0)  # to it the lease has expired
    assert second.wait() == 0, second.said
    before = s3.folder(name)
    first.signal(signal.SIGCONT)
    assert first.wait() in (0, 2), first.said
    assert first.wait() == 0 or first.error
    work.count("other faults", 2)
    after = s3.folder(name)
    assert {key: after.get(key) for key in before} == before
    assert not [key for key in after if key not in before]
    copy = tmp_path / name
    copy.mkdir()
    for key, content in after.items():
        (copy / key).write_bytes(content)
    work.judge(copy)
