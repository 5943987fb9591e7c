"""What tests of training runs share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.step import Stepper, StepResult
from transformers import AutoModelForCausalLM

Make = Callable[..., Path]
Examples = Callable[..., list[TargetExample]]


def folder_settings(method: str, form: str, residual: str, **parameters: float) -> dict[str, Any]:
    own = {"method": method, "form": form, "parameters": parameters}
    return own | {"residual": residual, "tail_shape": "student"}


ANCHORED = folder_settings("sft+kl", "frozen-target", "base", lam=0.1)
LIVE = {
    "dft": folder_settings("dft", "live", "observed"),
    "iw-sft": folder_settings("iw-sft", "live", "base-observed", T=1.0),
    "psft": folder_settings("psft", "live", "base-observed", eps_hi=0.28),
    "target-sft": folder_settings("target-sft", "live", "teacher", eta=0.5),
}


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(settings: TrainSettings, step: int) -> None:
    """Train until the end of an optimizer step, then stop as a killed process does."""
    take = Stepper.step

    def take_or_stop(self: Stepper, number: int, *arguments: Any) -> StepResult:
        result = take(self, number, *arguments)
        if number == step:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", take_or_stop)
        with pytest.raises(Killed):
            train(settings)


def read_log(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's log; of one event, if it is given."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(left: Path, right: Path, **tolerance: float) -> None:
    torch.testing.assert_close(weights(left), weights(right), **tolerance)
