"""Trainings that are killed, really, at random moments, against one that is not."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from qpipe.trainer.checkpoint import checkpoints_in
from safetensors.torch import load_file

STEPS = 400  # of a few milliseconds


def command(targets: Path, model: Path, out: Path, processes: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = ["-m", "qpipe.stages", "train", "--targets", targets, "--model", model, "--out", out]
    words += ["--batch-size", 2, "--epochs", 100, "--max-steps", STEPS, "--save-every", 3]
    words += ["--learning-rate", 1e-3, "--eval-fraction", 0.2, "--eval-every", 50]
    return [sys.executable, *(launch if processes > 1 else []), *map(str, words)]


def killed_after(words: list[str], out: Path, step: int, delay: float) -> None:
    """Start it, and kill it and its children with SIGKILL some time after a step was logged."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            while logged(out) < step and process.poll() is None:
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (-signal.SIGKILL, 0)


def logged(out: Path) -> int:
    """The last step of the log, 0 where there is none."""
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum('"event": "step"' in line for line in lines)


def checkpointed(out: Path) -> int:
    found = checkpoints_in(out)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    make_targets: Callable[..., Path],
    make_examples: Callable[..., list],
    model: Path,
    tmp_path: Path,
    kills: int,
) -> None:
    """On one CPU process, bit for bit."""
    targets = make_targets(make_examples(17))
    rng = random.Random(kills)
    out = tmp_path / "killed"
    moments = []
    for _ in range(kills):
        start = checkpointed(out)
        target = start + rng.randint(1, 1 + STEPS // kills)
        killed_after(command(targets, model, out), out, target, rng.uniform(0, 0.03))
        moments.append(logged(out))
        assert moments[-1] < STEPS  # it was killed in time
        assert not (out / "qpipe.json").exists()
    assert len(set(moments)) > kills // 2
    for folder in (out, tmp_path / "undisturbed"):
        subprocess.run(
            command(targets, model, folder), env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True, capture_output=True,
        )  # fmt: skip
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (out, tmp_path / "undisturbed")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "undisturbed").iterdir()
    }
    assert logged(out) == STEPS
