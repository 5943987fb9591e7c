"""Files that somebody removes, cuts or changes while a command works with them."""

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.pipeline.folders.shards import sidecar_path
from qpipe.tests.faults.work import Work
from qpipe.tests.support.tiers import slow
from qpipe.trainer.run.checkpoint import checkpoints_in

OPERATIONS = 1000
# the commands that make shards
SHARDS = ("score", *slow("build-targets", "share"))

Copy = Callable[[str], tuple[Work, Path]]


@pytest.mark.parametrize("step", [29, *slow(1)])
@pytest.mark.parametrize("fault", ["remove", *slow("truncate")])
@pytest.mark.parametrize("name", SHARDS)
def test_a_finished_shard(
    works: Mapping[str, Work], name: str, tmp_path: Path, fault: str, step: int
) -> None:
    """No folder is sealed without it, and one that was sealed just before is called damaged."""
    work = works[name]
    for number in range(step // 2 + 1, OPERATIONS, step):
        out = tmp_path / str(number)
        shard = out / "shard-00000.arrow"
        command = work.strike(out, fault, number, victim=shard)
        if shard.exists() and shard.stat().st_size == size(work.undisturbed / shard.name):
            assert command.wait() == 0, command.said
            work.judge(out)  # the fault came before the shard
        elif (out / "manifest.json").exists():
            again = work.start(out)
            assert again.wait() == 2, again.said
            assert again.error.startswith(f"Error: {shard}: ")
            break
        else:
            assert command.wait() == 2, command.said
            assert command.error.startswith(f"Error: {shard}: ")
            work.resume(out)
    assert number > 2 * step


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize("step", [29, *slow(3)])
@pytest.mark.parametrize("name", SHARDS)
def test_what_a_killed_run_left(
    works: Mapping[str, Work], name: str, tmp_path: Path, step: int
) -> None:
    """Shards cut, changed or removed, sidecars removed: these are made again, the others kept."""
    work = works[name]
    for number in range(step, OPERATIONS, step):
        out = tmp_path / str(number)
        if work.start(out, fault="kill", at=number).wait() == 0:
            break
        work.count("kills")
        if (out / "manifest.json").exists():  # sealed: what happens to it now is damage
            break
        for index, path in enumerate(sorted(out.glob("shard-*.arrow"))):
            match index % 4:
                case 0:
                    os.truncate(path, size(path) - 1)
                case 1:
                    path.unlink()
                case 2:
                    path.write_bytes(path.read_bytes()[:-1] + b"?")
                case 3:
                    sidecar_path(out, index).unlink(missing_ok=True)
        work.count("other faults")
        work.resume(out)


@pytest.fixture
def copied(works: Mapping[str, Work], tmp_path: Path) -> Copy:
    """A command whose input is a copy, made just now, and where that lies."""

    def copy(name: str) -> tuple[Work, Path]:
        work = works[name]
        source = next(
            word
            for before, word in zip(work.words, work.words[1:], strict=False)
            if before in ("--demonstrations", "--scores", "share", "--targets")
        )
        assert isinstance(source, Path)
        place = tmp_path / "input" / source.name
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            place.parent.mkdir()
            shutil.copyfile(source, place)
        return replace(work, words=tuple(place if w == source else w for w in work.words)), place

    return copy


@pytest.mark.parametrize("fault", ["garble", *slow("remove", "truncate")])
@pytest.mark.parametrize("at", [5, *slow(0, 12)])
@pytest.mark.parametrize("name", ["build-targets", "share", "train"])
def test_a_shard_that_is_read(name: str, copied: Copy, tmp_path: Path, fault: str, at: int) -> None:
    """The folder is not finished from it; once the shard is back, the run goes on.

    A training compares the hashes as it starts; what garbles bytes in place later goes unnoticed.
    """
    if name == "train" and fault == "garble" and at > 0:
        return
    work, source = copied(name)
    shard, out = source / "shard-00005.arrow", tmp_path / "out"
    content = shard.read_bytes()
    command = work.strike(out, fault, at, victim=shard)
    if command.wait() == 0:  # a training had read it, whole
        assert name == "train"
        assert at > 0
        judge(work, out)
        return
    assert command.wait() == 2, command.said
    assert command.error.startswith(f"Error: {shard}: ")
    shard.write_bytes(content)
    again = work.start(out)
    assert again.wait() == 0, again.said
    work.count("resumes")
    judge(work, out)


def judge(work: Work, out: Path) -> None:
    """As `Work.judge`, the record of a training left out, which names its inputs' place."""
    if work.name == "train":
        undisturbed = out.with_name("undisturbed")
        shutil.copytree(work.undisturbed, undisturbed)
        shutil.copyfile(out / "qpipe.json", undisturbed / "qpipe.json")
        work = replace(work, undisturbed=undisturbed)
    work.judge(out)


@pytest.mark.parametrize("fault", ["truncate", *slow("remove", "garble")])
@pytest.mark.parametrize("at", [3, *slow(9)])
def test_demonstrations(copied: Copy, tmp_path: Path, fault: str, at: int) -> None:
    """Scores are of what was fingerprinted, or of nothing."""
    work, file = copied("score")
    content, out = file.read_bytes(), tmp_path / "out"
    command = work.strike(out, fault, at, victim=file)
    assert command.wait() == 2, command.said
    assert command.error.startswith(f"Error: demonstrations {file}: ")
    file.write_bytes(content)
    work.resume(out)


@pytest.mark.parametrize("fault", [*slow("remove"), "truncate"])
def test_a_checkpoint(works: Mapping[str, Work], tmp_path: Path, fault: str) -> None:
    """The run says which to remove, and goes on from the one before."""
    work, out = works["train"], tmp_path / "out"
    command = work.start(out)
    while len(checkpoints_in(out)) < 2:
        assert command.is_running, command.said
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    work.count("kills")
    *_, last = checkpoints_in(out)
    for path in last.iterdir():
        if fault == "remove":
            path.unlink()
        else:
            os.truncate(path, size(path) // 2)
    work.count("other faults")
    refused = work.start(out)
    assert refused.wait() == 2, refused.said
    assert refused.error.startswith(f"Error: {last}")
    shutil.rmtree(last)
    work.resume(out)
