"""Layers of vLLM's CPU build as one kernel each, against float64, in a real engine's model."""

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qpipe.stages.engines.supervised_rows.cpu_layers import fuse_layers
from qpipe.stages.engines.supervised_rows.worker import RowsExtension
from torch import Tensor


@pytest.fixture
def layers(vllm_scorer: Any) -> dict[str, list[Any]]:
    """The norms and the activations of the engine's model, by their class."""
    (found,) = vllm_scorer.llm.apply_model(lambda model: list(model.modules()))
    names = ("RMSNorm", "SiluAndMul")
    return {name: [layer for layer in found if type(layer).__name__ == name] for name in names}


def normed(x: Tensor, layer: Any) -> Tensor:
    x = x.double()
    scale = (x.square().mean(dim=-1, keepdim=True) + layer.variance_epsilon).rsqrt()
    return (x * scale * layer.weight.double()).to(torch.float32)


def test_an_engine_on_a_cpu_uses_the_kernels(layers: dict[str, list[Any]]) -> None:
    both = layers["RMSNorm"] + layers["SiluAndMul"]
    assert len(layers["RMSNorm"]) == 2 * len(layers["SiluAndMul"]) + 1 > 1
    assert all(fuse_layers.__module__ == each._forward_method.__module__ for each in both)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_norm_is_that_of_float64(layers: dict[str, list[Any]], shape: tuple[int, ...]) -> None:
    layer = layers["RMSNorm"][0]
    x, residual = torch.randn((2, *shape, len(layer.weight)))
    torch.testing.assert_close(layer(x), normed(x, layer))
    total = x + residual
    found, added = layer(x, residual)
    torch.testing.assert_close(found, normed(total, layer))
    torch.testing.assert_close(added, total)


def test_a_norm_takes_columns_and_other_formats(layers: dict[str, list[Any]]) -> None:
    layer = layers["RMSNorm"][0]
    columns = torch.randn(4, 2, len(layer.weight)).transpose(0, 1)
    torch.testing.assert_close(layer(columns), normed(columns, layer))
    half = torch.randn(4, len(layer.weight)).bfloat16()
    torch.testing.assert_close(layer(half).float(), normed(half, layer), rtol=1e-2, atol=1e-2)


def test_an_activation_is_that_of_float64(layers: dict[str, list[Any]]) -> None:
    layer = layers["SiluAndMul"][0]
    for x in (torch.randn(5, 64), torch.randn(64, 5).T):
        gate, value = x.double().chunk(2, dim=1)
        expected = gate * gate.sigmoid() * value
        torch.testing.assert_close(layer(x), expected.float())


def test_a_layer_that_computes_something_else_stays(layers: dict[str, list[Any]]) -> None:
    layer = copy(layers["RMSNorm"][0])
    layer.variance_size_override = 2  # of the first two columns
    layer._forward_method = layer.forward_native
    assert fuse_layers(torch.nn.Sequential(layer), torch.float32) == 0
    assert layer._forward_method == layer.forward_native


def test_models_on_gpus_stay() -> None:
    worker = RowsExtension()
    worker.model_runner = SimpleNamespace(device=torch.device("cuda"))
    assert worker.qpipe_fuse_layers() == 0
