"""The GPUs of one process of several that torchrun, or a launcher like it, starts on a machine."""

import os
from collections.abc import Mapping

from ...pipeline.errors import UserError
from .run import share_of
from .settings import Execution

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def take_own_gpus(execution: Execution, gpus: int) -> None:
    """Let this process see only the `gpus` GPUs of its LOCAL_RANK. To be called before CUDA starts.

    Otherwise each process would use the first. Raises UserError if there are too few.
    """
    import torch

    if execution.executor == "local" and execution.rank is None:
        own = own_gpus(os.environ, gpus, torch.cuda.device_count())
        if own is not None:
            os.environ[_VISIBLE] = own


def own_gpus(environment: Mapping[str, str], gpus: int, count: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES is to be, where `count` GPUs are visible; None if as it is.

    A launcher that shows a process no more than its own has divided them already.
    """
    is_array = "SLURM_ARRAY_TASK_ID" in environment
    if is_array or share_of(environment) is None or "LOCAL_RANK" not in environment or not count:
        return None
    if _VISIBLE in environment and count <= gpus:
        return None
    first = int(environment["LOCAL_RANK"]) * gpus
    if first + gpus > count:
        raise UserError(
            f"LOCAL_RANK {environment['LOCAL_RANK']}: {count} GPUs are visible, and each process "
            f"takes {gpus}: start at most {count // gpus} processes on this machine"
        )
    visible = environment.get(_VISIBLE, ",".join(map(str, range(count)))).split(",")
    return ",".join(visible[first : first + gpus])
