"""Rows of logits in blocks: the same bits as all at once."""

import pytest
import torch
from qpipe.stages.engines.supervised_rows.gather import gathered_log_probs
from qpipe.stages.engines.supervised_rows.summary import summarised_in_torch
from torch import Tensor

N, V, K, W = 23, 1000, 7, 3  # rows, vocabulary, top k, given ids


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 4


def of_all_rows(logits_NV: Tensor) -> list[Tensor]:
    observed_N = torch.arange(len(logits_NV)) * 11 % V
    given_NW = (observed_N[:, None] + torch.arange(W)) % V
    at_N = logits_NV[torch.arange(len(logits_NV)), observed_N]
    return [
        *gathered_log_probs(logits_NV, observed_N, given_NW, K),
        *summarised_in_torch(logits_NV, at_N, K),
    ]


@pytest.mark.parametrize("rows", [1, 2, 10, N - 1, N, N + 1])
def test_blocks_of_any_size_give_the_same_bits(
    rows: int, logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_all_rows(logits)
    monkeypatch.setattr("qpipe.stages.engines.supervised_rows.blocks.BLOCK_VALUES", rows * V + 1)
    for found, whole in zip(of_all_rows(logits), expected, strict=True):
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole)


def test_rows_larger_than_a_block_go_one_by_one(
    logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_all_rows(logits)
    monkeypatch.setattr("qpipe.stages.engines.supervised_rows.blocks.BLOCK_VALUES", V // 2)
    assert all(map(torch.equal, of_all_rows(logits), expected))


def test_no_rows_have_the_shapes_of_none() -> None:
    found = of_all_rows(torch.empty(0, V))
    assert [tuple(each.shape) for each in found[:5]] == [(0,), (0,), (0, K), (0, K), (0, W)]


def test_counts_are_those_of_logits_that_reach_the_given_one() -> None:
    """Ties count, and so does every logit of a row that is one value."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    found = summarised_in_torch(logits, torch.tensor([3.0, 5.0]), 2)
    assert found.counts_n.tolist() == [2, 4]
    assert not found.counts_n.dtype.is_floating_point
