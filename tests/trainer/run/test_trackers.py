"""TensorBoard and wandb show what log.jsonl holds."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.trainer.run.trackers import scalars
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings

from ...support.runs import killed_at, read_log


@pytest.fixture
def settings(settings: TrainSettings) -> TrainSettings:
    """Four steps."""
    return replace(
        settings,
        batch_size=4,
        eval_fraction=0.2,
        eval_every=2,
        save_every=2,
        track=("tensorboard",),
    )


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The log as TensorBoard ought to have it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_log(folder):
        for name, value in scalars(event).items():
            found.setdefault(name, []).append((event["step"], pytest.approx(value)))
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in names}


def test_names_of_a_line() -> None:
    line: dict[str, Any] = {"event": "step", "step": 3, "loss": 1.5, "tokens": 7, "bound": None}
    assert scalars(line) == {"step/loss": 1.5, "step/tokens": 7.0}
    line = {"event": "eval_command", "step": 3, "results": {"accuracy": 0.5, "n": 2}}
    assert scalars(line) == {"eval_command/accuracy": 0.5, "eval_command/n": 2.0}
    assert scalars({"event": "eval_command", "step": 3, "error": "exit status 1"}) == {}


def test_tensorboard_shows_the_log(settings: TrainSettings) -> None:
    train(settings)
    found = shown(settings.out)
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["evaluation/nll"]] == [0, 2, 4]
    assert found == logged(settings.out)
    assert train(replace(settings, track=())).was_done


def test_a_run_that_goes_on_is_shown_as_one(settings: TrainSettings) -> None:
    """What was shown after the checkpoint is shown once."""
    killed_at(settings, 4)
    assert [step for step, _ in shown(settings.out)["step/loss"]] == [1, 2, 3]
    train(settings)
    found = shown(settings.out)
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3, 4]
    assert found == logged(settings.out)


def test_a_run_that_starts_over_is_shown_anew(settings: TrainSettings) -> None:
    killed_at(settings, 1)
    train(settings)
    assert shown(settings.out) == logged(settings.out)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_whose_library_is_missing(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match=r"^--track wandb needs wandb: pip install 'qpipe\[wandb"):
        replace(settings, track=("wandb",))


def test_wandb_keeps_the_log(settings: TrainSettings) -> None:
    """Wherever wandb is installed; in a process of its own, without a network."""
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from qpipe.trainer.run.train import train\n"
        "from qpipe.trainer.settings import TrainSettings\n"
        "train(TrainSettings(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), track=('wandb',),"
        " eval_fraction=0.2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(settings.targets), settings.model, str(settings.out)],
        env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = settings.out.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    values = [value for name in logged(settings.out).values() for _, value in name]
    assert len(values) > 20
    for name in logged(settings.out):
        assert name.encode() in content
    losses = [event["loss"] for event in read_log(settings.out, "step")]
    assert all(str(loss).encode() in content for loss in losses)
