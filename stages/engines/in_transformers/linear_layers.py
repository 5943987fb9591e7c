"""The linear layers of a model in float32 on a CPU, computed by oneDNN.

torch gives float32 products to MKL, which takes up to 1.5 times as long on AMD processors with
AVX-512. MKL also sums in another order for another number of rows or threads. oneDNN computes a row
in the same way whatever the other rows and the threads are (a single row apart), so that the layers
add no difference between an example in one batch and the same in another.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_TRIED = 3, 16, 8  # rows, inputs, and outputs of the trial


def use_onednn(model: nn.Module) -> int:
    """Let the float32 linear layers on the CPU use oneDNN; returns how many do."""
    modules = model.modules()
    layers = [each for each in modules if type(each) is nn.Linear and _is_plain(each.weight)]
    if not layers or not _works():
        return 0
    for layer in layers:
        layer.forward = partial(_product, weight=layer.weight, bias=layer.bias)
    return len(layers)


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b by the operator that compiled models use; torch has no public function for it."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@torch.inference_mode()
def _works() -> bool:
    """Whether this torch has the operator, and it gives the same on a trial."""
    rows, inputs, outputs = _TRIED
    x = torch.linspace(-1, 1, rows * inputs).view(rows, inputs)
    weight = torch.linspace(-1, 2, outputs * inputs).view(outputs, inputs)
    try:
        for bias in (None, weight[:, 0].contiguous()):
            torch.testing.assert_close(_product(x, weight, bias), linear(x, weight, bias))
    except Exception:  # built without oneDNN, or another form: the layers stay as they are
        return False
    return True
