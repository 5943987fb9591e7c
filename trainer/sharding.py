"""Fully sharded data parallelism: weights, gradients and moments spread over the processes.

torch's FSDP2, used directly: accelerate's plugin takes no CPU processes. Each decoder layer is
gathered when it is its turn; what is outside the layers (embeddings, the last norm, the head) for
the whole of a step, so that the fused loss meets a whole head.
"""

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from .models.heads import causal_model
from .models.student import Student

_PARAM_DTYPES = {"no": None, "bf16": torch.bfloat16}


def shard(student: Student, accelerator: Accelerator) -> None:
    """Spread a student over all processes, in place; every one of them calls it.

    It keeps float32 weights; those that are gathered have the type of the forward pass.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    dtype = _PARAM_DTYPES[str(accelerator.mixed_precision)]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    blocks = set(causal_model(student.model)._no_split_modules or ())
    for module in list(student.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(student, "measure")


def is_sharded(student: Student) -> bool:
    """Whether the weights are spread over processes."""
    return isinstance(student, FSDPModule)


def let_go(student: Student) -> None:
    """Keep no more than the own share of the weights, after a forward pass without a backward."""
    if isinstance(student, FSDPModule):
        student.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over processes, whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value
