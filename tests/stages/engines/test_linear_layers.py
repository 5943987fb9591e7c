"""The linear layers of a scored model on a CPU: the same values, whatever the other rows are."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.in_transformers.linear_layers import use_onednn
from qpipe.stages.engines.settings import EngineSettings
from qpipe.tests.support.examples import unweighted
from qpipe.trainer.models.files import find_model
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


class Subclass(nn.Linear):
    """A layer that may compute anything."""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_the_values_are_those_of_float64(has_bias: bool) -> None:
    layer = nn.Linear(200, 96, bias=has_bias)
    x_BTD = torch.randn(3, 50, 200)
    bias = layer.bias.double() if has_bias else None
    expected = linear(x_BTD.double(), layer.weight.double(), bias)
    assert use_onednn(layer) == 1
    for x, values in ((x_BTD, expected), (x_BTD[0], expected[0]), (x_BTD[0, 0], expected[0, 0])):
        torch.testing.assert_close(layer(x).double(), values, rtol=0, atol=1e-5)
    assert layer(x_BTD[:0]).shape == (0, 50, 96)
    assert layer(torch.randn(200, 4).T).shape == (4, 96)  # not contiguous


@needs_onednn
@torch.inference_mode()
def test_a_row_has_the_same_bits_with_any_rows_and_threads(threads: None) -> None:
    layer = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.Linear(1536, 320, bias=False))
    assert use_onednn(layer) == 2
    x = torch.randn(700, 576)
    torch.set_num_threads(1)
    expected = layer(x)
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (2, 3, 17, 64, 333, 699):
            assert torch.equal(layer(x[:rows]), expected[:rows])
            assert torch.equal(layer(x[-rows:]), expected[-rows:])


def test_other_layers_stay_as_they_are() -> None:
    others = nn.ModuleList([Subclass(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).double()])
    assert use_onednn(others) == 0
    assert all("forward" not in vars(layer) for layer in others)


@pytest.mark.parametrize("operators", [{}, {"_linear_pointwise": lambda x, w, *_: x @ w.T + 1}])
def test_an_operator_that_is_missing_or_another_is_not_used(
    operators: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    expected = layer(x)
    assert use_onednn(layer) == 0
    assert torch.equal(layer(x), expected)


class Products(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_onednn
def test_a_scored_model_computes_its_layers_and_its_head_so(tiny_model: Path) -> None:
    files = find_model(str(tiny_model))
    scorer = make_scorer(files, EngineSettings("transformers", "float32", max_length=256))
    ids, positions = torch.arange(1, 9).int().numpy(), torch.tensor([3, 7]).int().numpy()
    with Products() as products:
        list(scorer.score([unweighted("e", ids, positions)], 5))
    assert "mkldnn._linear_pointwise.default" in products.names
    others = {"aten.linear.default", "aten.mm.default", "aten.addmm.default"}
    assert not others & set(products.names)
