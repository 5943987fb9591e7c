"""Where a stage runs: the share that options and environments mean, and options refused."""

import os
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.tasks import TaskShare
from qpipe.stages.execution.own_gpus import own_gpus, take_own_gpus
from qpipe.stages.execution.run import share_of, task_of
from qpipe.stages.execution.settings import Execution


def array(task: int, tasks: int, first: int = 0, step: int = 1) -> dict[str, str]:
    values = {"ID": task, "COUNT": tasks, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "3"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4"}, TaskShare(3, 4)),
        (array(0, 8), TaskShare(0, 8)),
        (array(7, 8), TaskShare(7, 8)),
        (array(1, 8, first=1), TaskShare(0, 8)),
        (array(8, 8, first=1), TaskShare(7, 8)),
        (array(6, 4, step=2), TaskShare(3, 4)),
        (array(5, 3, first=1, step=2), TaskShare(2, 3)),
        # the array's, not that of the launcher inside
        (array(2, 4) | {"RANK": "0", "WORLD_SIZE": "1"}, TaskShare(2, 4)),
    ],
)
def test_the_environment_tells_the_share(
    environment: dict[str, str], expected: TaskShare | None
) -> None:
    assert share_of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (array(7, 3), "SLURM_ARRAY_TASK_ID 7 is not one of 3 evenly spaced"),  # --array=0,3,7
        (array(2, 3, step=3), "not one of 3"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is ''"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "--rank 2 is out of range"),
    ],
)
def test_an_environment_without_ranks_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        share_of(environment)


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert task_of(Execution()) == TaskShare(1, 4)
    assert task_of(Execution(rank=2, world_size=3)) == TaskShare(2, 3)
    assert task_of(Execution(rank=0, world_size=1)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 2}, "--workers 2: requires --executor ray"),
        ({"workers": 0, "executor": "ray"}, "--workers 0 is out of range"),
        ({"ray_address": "auto"}, "--ray-address auto: requires --executor ray"),
        ({"rank": 1}, "--rank and --world-size require each other"),
        ({"world_size": 4}, "--rank and --world-size require each other"),
        ({"executor": "ray", "rank": 0, "world_size": 2}, "--rank 0: requires --executor local"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Execution(**options)


def torchrun(local: int, visible: str | None = None, tasks: int = 8) -> dict[str, str]:
    environment = {"RANK": f"{local}", "WORLD_SIZE": f"{tasks}", "LOCAL_RANK": f"{local}"}
    return environment if visible is None else environment | {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.parametrize(
    ("environment", "gpus", "count", "expected"),
    [
        (torchrun(3), 1, 8, "3"),
        (torchrun(3), 2, 8, "6,7"),
        (torchrun(1, "4,5,GPU-ab,7"), 2, 4, "GPU-ab,7"),
        (torchrun(3, "5"), 1, 1, None),  # the launcher has divided them
        (torchrun(3), 1, 0, None),  # a CPU
        (torchrun(0, tasks=1), 1, 8, "0"),
        ({}, 1, 8, None),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 1, 8, None),
        (array(3, 8) | torchrun(3), 1, 8, None),
    ],
)
def test_each_process_of_a_launcher_takes_its_own_gpus(
    environment: dict[str, str], gpus: int, count: int, expected: str | None
) -> None:
    assert own_gpus(environment, gpus, count) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"LOCAL_RANK 2: 4 GPUs are visible.*at most 2 processes"):
        own_gpus(torchrun(2), 2, 4)


def test_own_gpus_are_all_that_torch_and_vllm_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, value in torchrun(2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    take_own_gpus(Execution(rank=0, world_size=1), 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    take_own_gpus(Execution(), 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
