"""The options for where a stage runs and where its events are logged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...pipeline.errors import UserError, option_of
from ...pipeline.options import Range, check, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where a stage runs. None of it changes what is stored.

    For the executor local, `rank` and `world_size` are those of this task; None takes them from the
    environment (`share_of`). For ray, `workers` None starts as many as there are resources for, and
    `ray_address` None starts a cluster for this command.
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
        is_on_ray = self.executor == "ray"
        for name in ("rank", "world_size") if is_on_ray else ("workers", "ray_address"):
            if (value := getattr(self, name)) is not None:
                wanted, way_out = ("local", "leave it out") if is_on_ray else ("ray", "give both")
                raise UserError(
                    f"{option_of(name)} {value}: requires --executor {wanted}: {way_out}"
                )
        if (self.rank is None) != (self.world_size is None):
            raise UserError("--rank and --world-size require each other: give both or neither")
