"""A training run whose disk fills up: a small file system, and a process with a limit.

The file system is a tmpfs, where this user may mount one. RLIMIT_FSIZE, which stands everywhere,
fails in the middle of a write as well.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.checkpoint import checkpoints_in
from qpipe.trainer.loop import train
from qpipe.trainer.settings import TrainSettings
from safetensors.torch import load_file

Make = Callable[..., Path]
Examples = Callable[..., list[TargetExample]]

# the disk is full after the step given; else it is the command line as a user runs it
_SCRIPT = """
import os, resource, sys
from qpipe.stages.cli import main
from qpipe.trainer.step import Stepper
step, filler = int(sys.argv[1]), sys.argv[2]
def fill():
    if not filler:
        return resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    disk = os.statvfs(os.path.dirname(filler))
    with open(filler, "wb") as file:
        file.write(bytes(disk.f_bavail * disk.f_frsize - 40000))
take = Stepper.step
def take_and_fill(self, number, *rest):
    result = take(self, number, *rest)
    if number == step:
        fill()
    return result
Stepper.step = take_and_fill
sys.argv[1:] = sys.argv[3:]
sys.exit(main())
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def settings(
    make_targets: Make, make_examples: Examples, model: Path, tmp_path: Path
) -> TrainSettings:
    """Five steps, two checkpoints."""
    return TrainSettings(
        make_targets(make_examples(17)), str(model), tmp_path / "run",
        batch_size=4, save_every=2, learning_rate=1e-3,
    )  # fmt: skip


def full_after(step: int, settings: TrainSettings, filler: Path | str = "") -> str:
    """What the command says on standard error when the disk is full after a step."""
    words = ["--targets", settings.targets, "--model", settings.model, "--out", settings.out]
    words += ["--batch-size", 4, "--save-every", 2, "--learning-rate", 1e-3]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(step), str(filler), "train", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return done.stderr


CASES = pytest.mark.parametrize(
    ("step", "words", "kept"),
    [
        (3, "step-00000004: cannot be written: ", ["step-00000002"]),
        (5, "the model cannot be written: ", ["step-00000002", "step-00000004"]),
    ],
)


@pytest.mark.slow
@CASES
def test_a_limit_of_the_process(
    settings: TrainSettings, tmp_path: Path, step: int, words: str, kept: list[str]
) -> None:
    assert_says(full_after(step, settings), words)
    assert_whole(settings, tmp_path, kept)


@CASES
def test_a_full_disk(
    settings: TrainSettings, disk: Path, tmp_path: Path, step: int, words: str, kept: list[str]
) -> None:
    settings = replace(settings, out=disk / "run")
    assert_says(full_after(step, settings, disk / "filler"), words)
    (disk / "filler").unlink()
    assert_whole(settings, tmp_path, kept)


def assert_says(said: str, words: str) -> None:
    (line,) = [line for line in said.splitlines() if words in line]
    assert "make room, then run the same command again" in line
    assert "Traceback" not in said


def assert_whole(settings: TrainSettings, tmp_path: Path, kept: list[str]) -> None:
    """Nothing half-written lies about, and the run goes on as if nothing had been."""
    assert [path.name for path in checkpoints_in(settings.out)] == kept
    assert not list(settings.out.rglob(".model.tmp"))
    names = {path.name for path in settings.out.iterdir()}
    assert names == {"checkpoints", "log.jsonl", "plan.json"}
    assert {path.name for path in (settings.out / "checkpoints").iterdir()} == set(kept)
    train(settings)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (settings, undisturbed))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
