"""Trainings in two processes, each of which may stop in the middle as a killed process does."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from qpipe.tests.support.runs import killed_at
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.distributed import is_sharded
from qpipe.trainer.step.step import Stepper, StepResult

_LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
Run = tuple[TrainSettings, int | None]  # and the step at whose end it is killed


def train_in_two_processes(*runs: Run) -> None:
    """Train one run after the other in one launch."""
    with NamedTemporaryFile() as file:
        file.write(pickle.dumps(runs))
        file.flush()
        done = subprocess.run(
            [sys.executable, *_LAUNCH, __file__, file.name],
            # the folder of this file stays off the path: its modules have names of packages
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr


def _train(file: Path) -> None:
    """Be one of the processes; --fsdp, and nothing else, shards the weights over both."""
    take = Stepper.step
    for settings, stop in pickle.loads(file.read_bytes()):

        def checked(self: Stepper, *arguments: Any, fsdp: bool = settings.fsdp) -> StepResult:
            assert is_sharded(self.model) == fsdp
            return take(self, *arguments)

        Stepper.step = checked
        if stop is None:
            train(settings)
        else:
            killed_at(settings, stop)


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
