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
        "Where it runs: in this process, or on Ray, which makes shards on several workers and "
        "gives those of one that dies to another.",
    )
    workers: int | None = option(
        None,
        "Workers on Ray, an engine each.  [default: one for each GPU, or group of GPUs that share "
        "the model; without GPUs one a machine]",
        range=Range(1),
        metavar="N",
        names=("--workers", "--num-engines"),
    )
    ray_address: str | None = option(
        None,
        "A Ray cluster that is there; its machines must share --out.  [default: one on this "
        "machine, for this command]",
        metavar="auto|HOST:PORT",
    )
    rank: int | None = option(
        None,
        "This task's number, from 0, of --world-size: it makes shards R, R+W, R+2W, … and the last "
        "task to finish seals the folder.  [default: a Slurm array task's, or RANK]",
        metavar="R",
    )
    world_size: int | None = option(
        None,
        "Tasks that share the work, on one machine or many. The shards are the same whatever their "
        "number.  [default: the Slurm array's, or WORLD_SIZE; 1 without]",
        metavar="W",
    )
    log_json: Path | None = option(
        None,
        "Append JSON lines to this file as it runs: `start`, a `shard` for each that is committed, "
        "and `done`, or `part` where other tasks still have shards to make.",
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
