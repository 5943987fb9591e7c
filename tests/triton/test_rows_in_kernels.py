"""The kernels of supervised rows against dense float64, in Triton's interpreter."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from qpipe.stages.engines.supervised_rows import kernels, summary
from qpipe.stages.engines.supervised_rows.shards import shard_log_probs, whole_log_probs
from torch import Tensor

BLOCK, GROUP, CHUNK = 64, 16, 32  # so that small rows take several


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time, summarise = Lock(), kernels.summarise  # the interpreter changes global state

    def small(*rows: Any, block: int = BLOCK, chunk: int = CHUNK) -> tuple[Tensor, ...]:
        with one_at_a_time:
            return summarise(*rows, most_group=GROUP, block=block, chunk=chunk)

    monkeypatch.setattr(kernels, "summarise", small)


def rows_of(kind: str, n: int, size: int, dtype: torch.dtype) -> Tensor:
    """Logits in rows with more room, which holds NaN."""
    wide = torch.full((n, size + 11), torch.nan)
    logits = 3 * torch.randn(n, size, generator=torch.Generator().manual_seed(size))
    match kind:
        case "ties":
            logits = logits.round()
        case "equal":
            logits[:] = -1.5
        case "far":
            logits += 500
        case "low":  # fewer than k are finite
            logits[:, 3:] = -torch.inf
        case "zeros":
            logits = torch.where(logits > 0, 0.0, -0.0)
        case "near":  # they differ in the last bits of bfloat16
            logits = 1 + (torch.arange(n * size).reshape(n, size) * 7 % 16) / 128
        case "sorted":  # the top k are in neighbouring groups
            logits = logits.sort(dim=1).values
    wide[:, :size] = logits
    return wide.to(dtype)[:, :size]


KINDS = [
    ("plain", 110, 7),
    ("ties", 100, 8),
    ("equal", 83, 5),
    ("far", 64, 1),
    ("low", 97, 6),
    ("zeros", 90, 4),
    ("sorted", 130, 16),
    ("near", 70, 6),
    ("plain", 5, 5),
    ("plain", 1, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("kind", "size", "top_k", "dtype"),
    [(*each, DTYPES[i % 2]) for i, each in enumerate(KINDS)]
    + [("ties", 70, 8, dtype) for dtype in DTYPES],
)
def test_the_summary_is_that_of_dense_rows(
    kind: str, size: int, top_k: int, dtype: torch.dtype
) -> None:
    logits = rows_of(kind, 1, size, dtype)
    before = logits.clone()
    at_least = logits[:, size // 2].float()
    found = summary.summarise(logits, at_least, top_k)

    torch.testing.assert_close(logits, before, rtol=0, atol=0)
    dense = logits.double()
    assert found.highest_n.tolist() == dense.amax(1).tolist()
    log_sums = found.highest_n.double() + found.sums_n.double().log()
    torch.testing.assert_close(log_sums, dense.logsumexp(1), rtol=1e-6, atol=2e-6)
    assert found.counts_n.tolist() == (dense >= at_least.double()[:, None]).sum(1).tolist()
    top = (dense + 0.0).sort(dim=1, descending=True, stable=True)  # −0 is 0
    assert (found.logits_nk.double() + 0.0).tolist() == top.values[:, :top_k].tolist()
    assert found.ids_nk.tolist() == top.indices[:, :top_k].tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_have_log_probs_that_are_not(value: float) -> None:
    logits = rows_of("plain", 2, 70, torch.float32)
    logits[0, 40] = value
    observed = torch.tensor([3, 3])
    found = whole_log_probs(logits, observed, torch.empty(2, 0).long(), 2)
    assert found.observed_n.isfinite().tolist() == [False, True]


def test_many_entries_and_none() -> None:
    """A hundred in one block, no rows, and what the kernels do not take."""
    logits = rows_of("ties", 1, 600, torch.bfloat16)
    *_, ids_nk = kernels.summarise(logits, logits[:, 0].float(), 100, block=1024, chunk=1024)
    top = logits.double().sort(dim=1, descending=True, stable=True)
    assert ids_nk.tolist() == top.indices[:, :100].tolist()
    assert not len(kernels.summarise(logits[:0], logits[:0, 0].float(), 3)[-1])
    assert summary.has_kernels(logits, kernels.MOST_TOP_K)
    assert not summary.has_kernels(logits, kernels.MOST_TOP_K + 1)
    assert not summary.has_kernels(logits.double(), 3)
    assert not summary.has_kernels(logits.T, 3)


@pytest.mark.parametrize("sizes", [(90,), (88, 2, 0)])
def test_a_divided_vocabulary_gives_dense_log_probs(sizes: tuple[int, ...]) -> None:
    """Each part in a thread of its own, whose gathering waits for all."""
    n, V, k, count = 2, sum(sizes), 4, len(sizes)
    logits = rows_of("ties", n, V, torch.float32).contiguous()
    observed = torch.tensor([39, 89])
    given = torch.tensor([[5, -1], [89, 40]])
    barrier, shelf = Barrier(count, timeout=60), [torch.empty(0)] * count

    def all_gather(part: int, tensor_nc: Tensor) -> Tensor:
        shelf[part] = tensor_nc
        barrier.wait()
        whole = torch.stack(shelf, dim=1)
        barrier.wait()
        return whole

    firsts = [sum(sizes[:part]) for part in range(count)]
    parts = [logits[:, first : first + size] for first, size in zip(firsts, sizes, strict=True)]
    with ThreadPoolExecutor(count) as pool:
        found = list(
            pool.map(
                lambda part: shard_log_probs(
                    parts[part], firsts[part], observed, given, k, partial(all_gather, part)
                ),
                range(count),
            )
        )
    if count == 1:
        found.append(whole_log_probs(logits, observed, given, k))
    dense = logits.double().log_softmax(1)
    own = dense.gather(1, observed[:, None])
    top = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    for each in found:
        torch.testing.assert_close(each.observed_n.double(), own[:, 0], rtol=1e-6, atol=2e-6)
        assert each.ranks_n.tolist() == (dense >= own).sum(1).tolist()
        assert each.ids_nk.tolist() == top.tolist()
        torch.testing.assert_close(each.top_nk.double(), dense.gather(1, top), rtol=1e-6, atol=2e-6)
        at = dense.gather(1, given.clamp_min(0))[given >= 0]
        torch.testing.assert_close(each.given_nw[given >= 0].double(), at, rtol=1e-6, atol=2e-6)
