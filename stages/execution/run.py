"""Runs a stage in this process alone, as one task of several, or on Ray.

The content of the folder is the same in each case.
"""

import os
import sys
from collections.abc import Mapping

from ...pipeline.errors import UserError
from ...pipeline.folders.shard_run import StageResult, finished
from ...pipeline.folders.tasks import Stage, TaskResult, TaskShare, run_alone, run_task
from ...pipeline.folders.watch import Watcher
from ..engines.settings import Host
from .settings import Execution


def task_of(execution: Execution) -> TaskShare | None:
    """The share of this task; None if it is the only one."""
    if execution.rank is not None and execution.world_size is not None:
        share = TaskShare(execution.rank, execution.world_size)
    else:
        share = share_of(os.environ)
    return None if share is None or share.world_size == 1 else share


def share_of(environment: Mapping[str, str]) -> TaskShare | None:
    """The share of a task of a Slurm array, or of a process with RANK and WORLD_SIZE.

    Raises UserError if the ids of an array are not evenly spaced.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, tasks = (_number(environment, f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "COUNT"))
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        rank, rest = divmod(task - first, step)
        if rest or not 0 <= rank < tasks:
            raise UserError(
                f"SLURM_ARRAY_TASK_ID {task} is not one of {tasks} evenly spaced ids from {first}: "
                "give --rank and --world-size"
            )
        return TaskShare(rank, tasks)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return TaskShare(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
    return None


def run_stage(stage: Stage, execution: Execution | None = None) -> StageResult | TaskResult:
    """Make the missing shards of a stage's folder, and seal it when all exist."""
    execution = execution or Execution(rank=0, world_size=1)
    identity = stage.job.identity
    done = finished(stage.job.folder, identity)
    if done is not None:
        return done
    share = task_of(execution) if execution.executor == "local" else None
    label = "" if share is None else str(share)
    watcher = Watcher(identity.stage, identity.fingerprint, execution.log_json, label)
    if execution.executor == "ray":
        from .ray import run_on_ray

        return run_on_ray(stage, execution.workers, execution.ray_address, watcher)
    if share is None:
        return run_alone(stage, watcher)
    first, second = share.rank, share.rank + share.world_size
    print(f"{share}: makes shards {first}, {second}, …", file=sys.stderr)
    return run_task(stage, share, watcher)


def host_of_workers(execution: Execution | None) -> Host | None:
    """The machines of an existing Ray cluster, for whose engines this command decides; None where
    the engines run on this machine."""
    if execution is None or execution.ray_address is None:
        return None
    from .ray import host_of_cluster

    return host_of_cluster(execution.ray_address)


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    value = environment.get(name, "" if otherwise is None else str(otherwise))
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name} is {value!r} in the environment, not a number: give --rank and --world-size"
        ) from None
