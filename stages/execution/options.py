"""How a stage's run is carried out: alone, as one task of several, or on Ray; and who watches.

Nothing here changes what is stored.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UserError, require
from ...pipeline.folders.shard_run import StageResult, finished
from ...pipeline.folders.tasks import PartResult, Share, Stage, run_alone, run_share
from ...pipeline.folders.watch import Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The options that say where a stage runs, and where its events are logged.

    With `executor` local, `rank` and `world_size` are this task's; where both are None, the
    environment's (`share_of`). `workers` and `ray_address` go with `executor` ray: None are as many
    workers as there is room for, and a cluster of this command's own.
    """

    executor: str = "local"
    workers: int | None = None
    ray_address: str | None = None
    rank: int | None = None
    world_size: int | None = None
    log_json: Path | None = None

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "--workers", self.workers, "1 or more")
        if self.executor == "ray":
            for option, value in (("--rank", self.rank), ("--world-size", self.world_size)):
                if value is not None:
                    raise UserError(
                        f"{option} {value}: ray shares the work out itself: leave it out, or "
                        "--executor ray"
                    )
            return
        for option, value in (("--workers", self.workers), ("--ray-address", self.ray_address)):
            if value is not None:
                raise UserError(f"{option} {value}: goes with --executor ray: give that as well")
        if (self.rank is None) != (self.world_size is None):
            given, lacks = (
                ("--rank", "--world-size")
                if self.world_size is None
                else ("--world-size", "--rank")
            )
            raise UserError(f"{given} without {lacks}: give both, or neither")

    def share(self) -> Share | None:
        """The share of this task; None for a command that works alone."""
        if self.rank is not None and self.world_size is not None:
            share = Share(self.rank, self.world_size)
        else:
            share = share_of(os.environ)
        return None if share is None or share.world_size == 1 else share


def share_of(environment: Mapping[str, str]) -> Share | None:
    """The share of a Slurm array's task, or of a process with RANK and WORLD_SIZE.

    Raises UserError where the tasks of an array have no ranks.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, tasks = (_number(environment, f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "COUNT"))
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        rank, rest = divmod(task - first, step)
        if rest or not 0 <= rank < tasks:
            raise UserError(
                f"SLURM_ARRAY_TASK_ID {task} is not one of {tasks} in a row from {first}: give "
                "--rank and --world-size"
            )
        return Share(rank, tasks)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Share(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
    return None


def run_stage(stage: Stage, execution: Execution | None = None) -> StageResult | PartResult:
    """Make what is missing of a stage's folder, where the options say."""
    execution = execution or Execution(rank=0, world_size=1)
    identity = stage.job.identity
    done = finished(stage.job.folder, identity)
    if done is not None:
        return StageResult(done, was_done=True)
    share = execution.share() if execution.executor == "local" else None
    label = "" if share is None else str(share)
    watcher = Watcher(identity.stage, identity.fingerprint, execution.log_json, label)
    if execution.executor == "ray":
        from .ray import run_on_ray

        return run_on_ray(stage, execution.workers, execution.ray_address, watcher)
    if share is None:
        return run_alone(stage, watcher)
    print(
        f"{share}: makes shards {share.rank}, {share.rank + share.world_size}, …", file=sys.stderr
    )
    return run_share(stage, share, watcher)


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    value = environment.get(name, "" if otherwise is None else str(otherwise))
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name} is {value!r} in the environment, no number: give --rank and --world-size"
        ) from None
