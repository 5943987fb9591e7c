"""What the host waits for in a step: on a GPU it must not but once."""

from typing import Any

import pytest
import torch
from qpipe.pipeline.methods.table import choose
from qpipe.tests.support.dispatched import Dispatched
from qpipe.trainer.data.batch import packed_batch
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.student import load_student
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.step import Stepper

from ...support.runs import Examples


@pytest.mark.parametrize(
    ("method", "form"), [("sft+kl", "frozen-target"), ("target-sft", "live"), ("iw-sft", "live")]
)
def test_a_step_reads_from_the_device_once(
    model: Any,
    make_examples: Examples,
    method: str,
    form: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pathlib import Path

    from qpipe.trainer.models.files import find_model

    settings = TrainSettings(Path(), str(model), Path())
    student = load_student(find_model(str(model)), gradient_checkpointing=False)
    assert can_pack(student.model)
    choice = choose(method, form)
    stepper = Stepper(
        start_accelerator("float32"), student, settings, Objective(choice, "student", "base")
    )
    batches = [packed_batch(make_examples(5, seed=seed)) for seed in range(2)]
    stepper.step(1, batches, learning_rate=0.0)
    read: list[int] = []
    tolist = torch.Tensor.tolist

    def counting(self: torch.Tensor) -> Any:
        read.append(self.numel())
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    with Dispatched() as step:
        stepper.step(2, batches, learning_rate=0.0)
    assert step.reads == []
    assert len(read) == 1
    assert "mm" in step.kernels or "addmm" in step.kernels
