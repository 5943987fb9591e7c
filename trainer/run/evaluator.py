"""Evaluation during a run: on held-out examples, and by a command of the user.

The command runs on a model folder and prints numbers as JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...pipeline.errors import UserError, one_line
from ...pipeline.storage.json_files import is_number
from ..data.steps import Cadence, HeldOut
from ..models.files import ModelFiles
from ..models.saving import save_model
from ..settings import CHECKPOINT, parse_command
from ..step.evaluate import Evaluation, evaluate
from ..step.step import Stepper
from .folder import Log

EVAL_MODEL = ".eval-model.tmp"  # in the run's folder, while --eval-command runs

# set by torchrun for its processes; the command is not one of them
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_TORCHRUN_TOO = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """Evaluates a student in training and logs the results; every process calls it."""

    stepper: Stepper
    base: ModelFiles
    held_out: HeldOut
    folder: Path  # of the run
    command: str | None
    cadence: Cadence

    def evaluate(self, step: int, log: Log) -> Evaluation | None:
        """Evaluate after a step: on the held-out examples if there are any, and by the command."""
        found = None
        if len(self.held_out):
            accelerator, objective = self.stepper.accelerator, self.stepper.objective
            found = evaluate(self.stepper.student, self.held_out, accelerator, objective)
            log(event="evaluation", step=step, **asdict(found))
        if self.command is not None:
            self._run_command(self.command, step, log)
        return found

    def evaluate_if_due(self, step: int, log: Log) -> None:
        """Evaluate after a step of the cadence."""
        if self.cadence.is_due(step):
            self.evaluate(step, log)

    def _run_command(self, command: str, step: int, log: Log) -> None:
        """Run the command on the model as it is, while the other processes wait."""
        folder = self.folder / EVAL_MODEL
        accelerator = self.stepper.accelerator
        outcome: dict[str, Any] = {}
        try:
            save_model(self.stepper.student, self.base, folder, accelerator.is_main_process)
            if accelerator.is_main_process:
                outcome = run_command(command, folder)
        except UserError as error:
            outcome = {"error": str(error)}
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        log(event="eval_command", step=step, **outcome)
        if "error" in outcome:
            tqdm.write(f"step {step}: --eval-command failed: {outcome['error']}", file=sys.stderr)
        accelerator.wait_for_everyone()


def run_command(command: str, checkpoint: Path) -> dict[str, Any]:
    """Run the command on a model folder; returns {"results": numbers} or {"error": text}."""
    place = str(checkpoint.resolve())
    words = [word.replace(CHECKPOINT, place) for word in parse_command(command)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_TORCHRUN and not name.startswith(_OF_TORCHRUN_TOO)
    }
    try:
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        return {"error": one_line(error)}
    if done.returncode != 0:
        return {"error": f"exit status {done.returncode}"}
    results = _numbers(done.stdout.decode(errors="replace"))
    if not results:
        return {"error": "its last line of output is not a JSON object with numbers"}
    return {"results": results}


def _numbers(output: str) -> dict[str, float]:
    """The numbers of the JSON object on the last line that is not empty."""
    lines = output.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        found = json.loads(last)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if is_number(value)}
