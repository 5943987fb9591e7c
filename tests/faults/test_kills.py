"""Commands that are killed with SIGKILL, and then started again.

At every operation on the names in their folder in turn, and at random moments; alone, as one of two
tasks that share the work, and on their way to a bucket.
"""

import random
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.s3 import Bucket
from qpipe.tests.support.tiers import slow

OPERATIONS = 1000  # more than any of the commands needs


@pytest.mark.parametrize("step", [29, *slow(1)])
def test_at_any_operation(work: Work, tmp_path: Path, step: int) -> None:
    for number in range(step // 2 + 1, OPERATIONS, step):
        out = tmp_path / str(number)
        status = work.start(out, fault="kill", at=number).wait()
        if status == 0:  # it needs fewer
            break
        assert status == -signal.SIGKILL
        work.count("kills")
        work.resume(out)
    assert step < number < OPERATIONS


@pytest.mark.slow
def test_at_random_moments(work: Work, tmp_path: Path) -> None:
    """Again and again before it is let finish, so that what goes on is killed as well."""
    rng = random.Random(work.name)
    done = number = 0
    while done < 40:
        number += 1
        out = tmp_path / str(number)
        for _ in range(rng.randint(1, 4)):
            done += killed(work, out, rng.uniform(0, work.seconds))
        work.resume(out)


def killed(work: Work, out: Path, seconds: float, *more: object) -> bool:
    """Start it, and kill it after some time; whether it had not ended before."""
    command = work.start(out, *more)
    time.sleep(seconds)
    command.signal(signal.SIGKILL)
    status = command.wait()
    assert status in (0, -signal.SIGKILL), command.said
    is_killed = status == -signal.SIGKILL
    work.count("kills", int(is_killed))
    return is_killed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "build-targets"])
def test_one_of_two_tasks(works: Mapping[str, Work], name: str, tmp_path: Path) -> None:
    """The other goes on; when both have ended well, the folder is whole and tidy."""
    work = works[name]
    rng = random.Random(name)
    for number in range(12):
        out = tmp_path / str(number)
        other = work.start(out, "--rank", 1, "--world-size", 2)
        killed(work, out, rng.uniform(0, work.seconds), "--rank", 0, "--world-size", 2)
        assert other.wait() == 0, other.said
        again = work.start(out, "--rank", 0, "--world-size", 2)
        assert again.wait() == 0, again.said
        work.count("resumes")
        work.judge(out)


@pytest.mark.slow
def test_on_the_way_to_a_bucket(works: Mapping[str, Work], s3: Bucket, tmp_path: Path) -> None:
    """Nothing but the folder is in the bucket afterwards, and nothing where temporary files go."""
    import os

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    reaching = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    work = replace(
        works["share"], name="share to s3", environment=reaching | {"TMPDIR": str(temporary)}
    )
    rng = random.Random(0)
    expected = {path.name: path.read_bytes() for path in work.undisturbed.iterdir()}
    kills = 0
    while kills < 12:
        command = work.start("s3://bucket/copy")
        time.sleep(rng.uniform(0, 4 * work.seconds))
        command.signal()
        is_killed = command.wait() == -signal.SIGKILL
        kills += is_killed
        work.count("kills", is_killed)
        if rng.random() < 0.4:
            continue
        command = work.start("s3://bucket/copy")
        assert command.wait() == 0, command.said
        work.count("resumes")
        found = s3.folder("copy")
        work.count("wrong", sum(found.get(name) != expected[name] for name in expected))
        work.count(
            "left over", len(found.keys() - expected.keys()) + len(list(temporary.iterdir()))
        )
        assert found == expected
        assert not list(temporary.iterdir())
        s3.remove(*s3.names())
