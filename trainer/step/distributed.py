"""Processes, devices and precision; weights sharded over processes."""

import ctypes
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ...pipeline.errors import UserError
from ..models.heads import causal_model
from ..models.student import Student
from ..settings import Precision

_ACCELERATE_NAMES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def start_accelerator(precision: Precision, waits_long: bool = False) -> Accelerator:
    """Devices, processes and mixed precision; "auto" is bfloat16 on a GPU that has it.

    On a CPU the process keeps freed memory from now on. Collective operations time out after some
    minutes, after a day with `waits_long`. Raises UserError for float16 without a GPU, for more
    processes than GPUs, and for several processes without a launcher.
    """
    _refuse_half_launched()
    place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.cuda.is_available() and place >= gpus:
        raise UserError(
            f"process {place + 1} on this machine has no GPU, of which there are {gpus}: start as "
            f"many processes as there are: torchrun --nproc-per-node {gpus}"
        )
    if precision == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if has_bfloat16 else "float32"
    if precision == "float16" and not torch.cuda.is_available():
        raise UserError("--precision float16 needs a GPU: give float32 or bfloat16")
    AcceleratorState._reset_state()  # or a second run in one process keeps the first's precision
    # without cpu=True it ignores torchrun's processes on a CPU: each would train alone
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        keep_freed_memory()
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=timedelta(days=1))] if waits_long else []
    return Accelerator(
        cpu=on_cpu, mixed_precision=_ACCELERATE_NAMES[precision], kwargs_handlers=handlers
    )


def _refuse_half_launched() -> None:
    """Raises UserError where the environment names several processes, but not where they meet."""
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and missing:
        raise UserError(
            f"WORLD_SIZE is {processes} in the environment, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start training with torchrun "
            f"--nproc-per-node {processes}, or unset WORLD_SIZE"
        )


def precision_of(accelerator: Accelerator) -> str:
    """The precision of the forward pass."""
    names = {theirs: ours for ours, theirs in _ACCELERATE_NAMES.items()}
    return names[accelerator.mixed_precision]


_PARAM_DTYPES = {"no": None, "bf16": torch.bfloat16}


def shard(student: Student, accelerator: Accelerator) -> None:
    """Shard a student's weights over all processes, in place; every process calls it.

    The shards stay float32; gathered weights have the type of the forward pass.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    dtype = _PARAM_DTYPES[str(accelerator.mixed_precision)]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    blocks = set(causal_model(student.model)._no_split_modules or ())
    for module in list(student.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    for name in ("measure", "keeps_head_form"):
        register_fsdp_forward_method(student, name)


def is_sharded(student: Student) -> bool:
    """Whether the weights are sharded over processes."""
    return isinstance(student, FSDPModule)


def reshard(student: Student) -> None:
    """Free gathered weights after a forward pass without a backward."""
    if isinstance(student, FSDPModule):
        student.reshard()


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def true_on_any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """True on every process if the flag is true on at least one (all-reduce)."""
    if accelerator.num_processes == 1:  # without waiting for the device
        return flag
    flags = torch.tensor(int(flag)).to(accelerator.device)
    return bool(accelerator.reduce(flags, "sum"))


# mallopt's parameters, from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_MOST = 32 * 2**20  # bytes; the library's maximum


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory, which CPU training would page in again at each step.

    By default glibc returns most of the memory of a step to the system, which must find and zero
    pages for the next step: 120,000 of them with 135 million weights, nearly a tenth of the step's
    time; this leaves a third of them. Arrays above 32 MiB are still returned: kept, they would
    leave holes that only arrays of their size could fill. Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _MOST)
        set_option(_TRIM_THRESHOLD, _NEVER)
