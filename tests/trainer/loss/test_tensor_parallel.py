"""The loss of two processes that share the vocabulary, against the loss of the whole of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from qpipe.trainer.loss import sparse_cross_entropy, vocabulary_parallel_cross_entropy
from torch import Tensor

N, V, S = 40, 23, 6
CUTS = [0, 9, V]  # the ids of the two processes


def targets(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Supports of 1 to S ids, some of them the whole mass, one without weight."""
    make = torch.Generator().manual_seed(seed)
    observed = torch.randint(V, (N,), generator=make)
    ids = torch.stack([torch.randperm(V, generator=make)[:S] for _ in range(N)])
    ids[:, 0] = torch.where((ids == observed[:, None]).any(1), ids[:, 0], observed)
    probs = torch.rand(N, S + 1, generator=make, dtype=torch.float64) ** 4
    probs[:8, -1] = 0  # no tail
    is_padding = torch.arange(S) >= torch.randint(1, S + 1, (N, 1), generator=make)
    is_padding &= ids != observed[:, None]
    probs[:, :S] = probs[:, :S].masked_fill(is_padding, 0)
    probs = probs / probs.sum(1, keepdim=True)
    trust = torch.rand(N, generator=make, dtype=torch.float64)
    trust[8:16], trust[16:20] = 0, 1
    weights = torch.rand(N, generator=make, dtype=torch.float64)
    weights[3] = 0
    return {
        "observed_ids": observed,
        "support_ids": ids.masked_fill(is_padding, -1),
        "support_probs": probs[:, :S].to(dtype),
        "tail_mass": probs[:, S].to(dtype),
        "trust": trust.to(dtype),
        "weights": weights.to(dtype),
    }


def logits(seed: int, dtype: torch.dtype) -> Tensor:
    make = torch.Generator().manual_seed(seed + 1)
    values = 4 * torch.randn(N, V, generator=make, dtype=torch.float64)
    values[5] += 500  # far from zero
    values[6, 3] += 300  # and a tail that is next to nothing
    return values.to(dtype)


CASES = [(seed, dtype) for seed in range(4) for dtype in (torch.float64, torch.float32)]


def of_one_process(rank: int, folder: str) -> None:
    """The loss and the gradient of a part of the vocabulary, for every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found: list[tuple[Tensor, Any]] = []
    for seed, dtype in CASES:
        own = logits(seed, dtype)[:, CUTS[rank] : CUTS[rank + 1]].clone().requires_grad_()
        loss = vocabulary_parallel_cross_entropy(own, CUTS[rank], **targets(seed, dtype))
        (3 * loss).backward()
        found.append((loss.detach(), own.grad))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Tensor, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("two")
    # not forked: other tests may have left threads and a process group in this process
    running = [
        subprocess.Popen(
            [sys.executable, __file__, f"{rank}", f"{folder}"],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        for rank in range(2)
    ]
    assert [each.wait(120) for each in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes_have_the_loss_and_the_gradient_of_the_whole(
    parts: list[list[tuple[Tensor, Tensor]]], case: int
) -> None:
    seed, dtype = CASES[case]
    whole = logits(seed, dtype).double().requires_grad_()
    wide = {
        name: each.double() if each.is_floating_point() else each
        for name, each in targets(seed, dtype).items()
    }
    loss = sparse_cross_entropy(whole, torch.eye(V, dtype=torch.float64), **wide)
    (3 * loss).backward()
    error = 1e-10 if dtype == torch.float64 else 3e-5
    close = {"rtol": error, "atol": error}
    (first, one), (second, other) = (part[case] for part in parts)
    assert first == second
    torch.testing.assert_close(first.double(), loss.detach(), **close)
    torch.testing.assert_close(torch.cat([one, other], dim=1).double(), whole.grad, **close)


if __name__ == "__main__":
    of_one_process(int(sys.argv[1]), sys.argv[2])
