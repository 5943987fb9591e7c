"""The simulation in small: forty workers and ranks that die, and everything once all the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.execution import ray as ray_cluster
from qpipe.tests.simulation.readers import Attempt, make_folder, read_epoch
from qpipe.tests.simulation.scheduler import (
    Trouble,
    folder_hash,
    run_array,
    run_ray,
    run_undisturbed,
)
from qpipe.trainer.data.mixture import mix

TROUBLE = Trouble(shards=120, workers=40, mean_life=200.0, at_a_file=0.3, absence=30.0)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed") / "scores", TROUBLE.shards)


def test_an_array_whose_tasks_die_makes_the_same_folder(tmp_path: Path, wanted: str) -> None:
    outcome = run_array(tmp_path / "scores", TROUBLE, rate=20_000, delay=0.0005)
    assert outcome.deaths > 10
    assert folder_hash(tmp_path / "scores") == wanted


@pytest.mark.parametrize("broken", [0, 8])
def test_ray_workers_that_die_make_the_same_folder(
    tmp_path: Path, wanted: str, broken: int
) -> None:
    """Also where every worker on one of five machines dies before it has started."""
    outcome = run_ray(tmp_path / "scores", TROUBLE, broken)
    assert outcome.deaths > 5
    assert folder_hash(tmp_path / "scores") == wanted


def test_ranks_that_die_read_each_sample_once_in_the_same_order(tmp_path: Path) -> None:
    parts = [make_folder(tmp_path / name, rows) for name, rows in (("a", 128), ("b", 64))]
    samples = mix(parts)
    whole = [example.id for example in samples.samples(0, range(192))]
    steps, in_vain, _ = read_epoch(
        samples, [Attempt(40, 3), Attempt(39, 2), Attempt(7, 1), Attempt(40)], step_samples=24
    )
    assert [row for step in steps for row in step] == whole
    assert len(set(whole)) == 192
    assert in_vain > 0


def test_a_head_that_works_for_nobody_takes_no_worker_and_leaves_the_others_their_cores() -> None:
    """`ray start --head --num-cpus 0`: one worker for each other machine, with all of its cores."""
    cores = [{"node": 1.0}, {"CPU": 64.0}, {"CPU": 64.0}]
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": each} for each in cores])
    stage: Any = SimpleNamespace(gpus=0)
    assert ray_cluster._room(ray, stage, None) == ray_cluster._Room(workers=2, cpus=64, gpus=0)
    with pytest.raises(UserError, match="--workers 129: Ray has 128 CPU cores"):
        ray_cluster._room(ray, stage, 129)


@pytest.mark.parametrize(
    ("machines", "gpus", "words"),
    [
        ([{"node": 1.0}], 0, "no machine with a CPU core for a worker"),
        ([{"CPU": 8.0}, {"GPU": 8.0}], 1, "no machine with a CPU core and a GPU for a worker"),
    ],
)
def test_machines_without_a_core_for_a_worker_are_refused(
    machines: list[dict[str, float]], gpus: int, words: str
) -> None:
    """Workers that have yet to join, or GPUs that would be left idle for the cores of another."""
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": each} for each in machines])
    stage: Any = SimpleNamespace(gpus=gpus)
    with pytest.raises(UserError, match=words):
        ray_cluster._room(ray, stage, None)
