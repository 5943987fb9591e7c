"""`sparse_cross_entropy` against dense float64 arithmetic over the whole vocabulary.

N positions, V vocabulary, S entries of the widest support, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from qpipe.trainer.loss import sparse_cross_entropy
from qpipe.trainer.loss.sparse import TailShape
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

N, V, D = 19, 31, 7
HEADS: list[dict[str, Any]] = [{}, {"scale": 0.5, "softcap": 3.0}]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 6 * V)  # 19 rows in four chunks


@dataclass
class Case:
    """Random supports of 1 to 6 entries, -1 behind them, and a head; all in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: dict[str, Any]


def case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(1, 7, (N,), generator=generator).tolist()
    rows = [rand(V).argsort()[:count] for count in counts]
    masses = [rand(count) for count in counts]
    tail = rand(N)
    totals = torch.stack([mass.sum() for mass in masses]) + tail
    probs = [mass / total for mass, total in zip(masses, totals, strict=True)]
    targets = {
        "observed_ids": torch.stack([row[-1] for row in rows]),
        "support_ids": pad_sequence(rows, batch_first=True, padding_value=-1),
        "support_probs": pad_sequence(probs, batch_first=True, padding_value=0.7),  # ignored
        "tail_mass": tail / totals,
        "trust": rand(N),
        "weights": rand(N) + 0.5,
    }
    return Case(2 * rand(N, D) - 1, 4 * rand(V, D) - 2, rand(V), targets)


def dense(
    case: Case, leaves: list[Tensor], tail: TailShape, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """The same loss, a position at a time, with the target written out over the vocabulary."""
    hidden, weight, bias = leaves
    scores = scale * (hidden @ weight.T + bias)
    logits = softcap * torch.tanh(scores / softcap) if softcap else scores
    log_probs = logits.log_softmax(1)
    total = logits.new_zeros(())
    given = case.targets
    for n in range(N):
        ids = [int(i) for i in given["support_ids"][n] if i >= 0]
        outside = [i for i in range(V) if i not in ids]
        trust, mass = given["trust"][n], given["tail_mass"][n]
        q = torch.zeros(V, dtype=torch.float64)
        q[ids] = (1 - trust) * given["support_probs"][n, : len(ids)]
        q[given["observed_ids"][n]] += trust
        if tail == "uniform":
            q[outside] = (1 - trust) * mass / len(outside)
            loss = -(q * log_probs[n]).sum()
        else:
            tail_log_prob = log_probs[n].exp()[outside].sum().log()
            loss = -(q * log_probs[n]).sum() - (1 - trust) * mass * tail_log_prob
        total = total + given["weights"][n] * loss
    return total


def leaves_of(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.to(dtype, copy=True).requires_grad_() for t in (case.hidden, case.weight, case.bias)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", ["student", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_loss_and_gradients_are_those_of_the_dense_target(
    tail: TailShape, head: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    given = case()
    exact = leaves_of(given)
    wanted = dense(given, exact, tail, **head)
    wanted_gradients = torch.autograd.grad(1.7 * wanted, exact)

    hidden, weight, bias = leaves = leaves_of(given, dtype)
    targets: dict[str, Any] = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in given.targets.items()
    }
    loss = sparse_cross_entropy(hidden, weight, bias=bias, tail=tail, **head, **targets)
    gradients = torch.autograd.grad(1.7 * loss, leaves)

    torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=tolerance)
    for found, truth in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=10 * tolerance)


def test_full_trust_is_the_plain_cross_entropy() -> None:
    given = case()
    ones, zeros = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    observed = given.targets["observed_ids"]
    loss = sparse_cross_entropy(
        given.hidden, given.weight, observed, observed[:, None], ones[:, None], zeros, ones, ones
    )
    logits = given.hidden @ given.weight.T
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, observed, reduction="sum")
    )


def test_a_wider_padding_changes_nothing() -> None:
    given = case()
    wider: dict[str, Any] = dict(given.targets)
    for name, value in (("support_ids", -1), ("support_probs", 0.3)):
        wider[name] = torch.nn.functional.pad(wider[name], (0, 4), value=value)
    head = (given.hidden, given.weight)
    torch.testing.assert_close(
        sparse_cross_entropy(*head, **wider), sparse_cross_entropy(*head, **given.targets)
    )


def test_a_row_without_its_observed_id_is_refused() -> None:
    given = case()
    given.targets["support_ids"][3] = (given.targets["observed_ids"][3] + 1) % V
    with pytest.raises(ValueError, match="observed id of every row"):
        sparse_cross_entropy(given.hidden, given.weight, **given.targets)
