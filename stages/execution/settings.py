"""The options that say where a stage runs, and where its events are logged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...pipeline.errors import UserError
from ...pipeline.options import Range, check, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where a stage runs. None of it changes what is stored.

    With `executor` local, `rank` and `world_size` are this task's; where both are None, the
    environment's (`share_of`). `workers` and `ray_address` go with `executor` ray: None are as many
    workers as there is room for, and a cluster of this command's own.
    """

    executor: Literal["local", "ray"] = option(
        "local",
        "Run in this process, or on Ray with several workers. Ray reassigns the shards of"
        " a worker that fails.",
    )
    workers: int | None = option(
        None,
        "Number of Ray workers, each with its own engine.  [default: one per GPU, or per "
        "group of GPUs that share the model; without GPUs one per machine]",
        range=Range(1),
        metavar="N",
        names=("--workers", "--num-engines"),
    )
    ray_address: str | None = option(
        None,
        "Address of an existing Ray cluster whose machines share --out.  [default: a "
        "local cluster for this command]",
        metavar="auto|HOST:PORT",
    )
    rank: int | None = option(
        None,
        "Index of this task, starting at 0. It makes shards R, R+W, R+2W, …; the last "
        "task to finish seals the folder.  [default: from the Slurm array, or RANK]",
        metavar="R",
    )
    world_size: int | None = option(
        None,
        "Number of tasks that share the work, on one or more machines. The shards do not "
        "depend on it.  [default: from the Slurm array, or WORLD_SIZE; else 1]",
        metavar="W",
    )
    log_json: Path | None = option(
        None,
        "Append events to this file as JSON lines: `start`, `shard` for each committed "
        "shard, and `done`, or `part` if other tasks still have shards to make.",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.executor == "ray":
            for name, value in (("--rank", self.rank), ("--world-size", self.world_size)):
                if value is not None:
                    raise UserError(
                        f"{name} {value}: ray shares the work out itself: leave it out, or "
                        "--executor ray"
                    )
            return
        for name, value in (("--workers", self.workers), ("--ray-address", self.ray_address)):
            if value is not None:
                raise UserError(f"{name} {value}: goes with --executor ray: give that as well")
        if (self.rank is None) != (self.world_size is None):
            given, lacks = (
                ("--rank", "--world-size")
                if self.world_size is None
                else ("--world-size", "--rank")
            )
            raise UserError(f"{given} without {lacks}: give both, or neither")
