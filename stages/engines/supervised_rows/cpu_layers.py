"""Norms and gated activations of vLLM's CPU build, each in one kernel.

On a CPU, vLLM leaves it to `torch.compile` to fuse them, and qpipe runs models without compilation,
in which such a layer reads and writes its tokens several times. The build has kernels for them, the
counterparts of those on GPUs. A layer takes its kernel if both agree on a trial.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]

_TRIED_ROWS, _TRIED_WIDTH = 3, 64  # the width for a layer without weights


def fuse_layers(model: nn.Module, dtype: torch.dtype) -> int:
    """Let the layers of a model use their kernels; returns how many do."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    kernels: dict[type, Callable[[Any], Forward]] = {RMSNorm: _norm, SiluAndMul: _silu_and_mul}
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in kernels]
    fused = 0
    for layer in layers:
        forward = kernels[type(layer)](layer)
        if _agree(layer, forward, dtype):
            layer._forward_method = forward
            fused += 1
    return fused


def _norm(layer: Any) -> Forward:
    plain = layer._forward_method

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        weight, epsilon = layer.weight.data, layer.variance_epsilon
        if not x.is_contiguous() or x.dtype != weight.dtype:
            return plain(x, residual)
        if residual is None:
            normed = torch.empty_like(x)
            torch.ops._C.rms_norm(normed, x, weight, epsilon)
            return normed
        torch.ops._C.fused_add_rms_norm(x, residual, weight, epsilon)  # in place, as on GPUs
        return x, residual

    return forward


def _silu_and_mul(layer: Any) -> Forward:
    plain = layer._forward_method

    def forward(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            return plain(x)
        result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        torch.ops._C.silu_and_mul(result, x)
        return result

    return forward


def _agree(layer: Any, fused: Forward, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what its layer does, to the accuracy of the number format."""
    weight = getattr(layer, "weight", None)
    width = _TRIED_WIDTH if weight is None else weight.shape[-1]
    x, residual = torch.randn((2, _TRIED_ROWS, width), dtype=dtype)
    ways = [(x,)] if weight is None else [(x,), (x, residual)]
    try:
        for inputs in ways:
            expected = layer._forward_method(*(each.clone() for each in inputs))
            found = fused(*(each.clone() for each in inputs))
            torch.testing.assert_close(found, expected)
    except Exception:  # another form of the layer, or of the kernel: vLLM's own way still works
        return False
    return True
