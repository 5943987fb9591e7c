"""The kernels against dense float64, in Triton's interpreter."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from qpipe.trainer.loss import kernels
from qpipe.trainer.loss.head import Head
from torch import Tensor

ROWS = 5
# the interpreter truncates to bfloat16; a GPU rounds, to half of this
BFLOAT16 = 2**-7


@dataclass(frozen=True)
class Case:
    """Scores and their targets."""

    scores: Tensor  # [n, V]
    ids: Tensor  # [n, S]
    mask: Tensor  # [n, S]
    target: Tensor  # [n, S]
    tail: Tensor  # [n]
    weights: Tensor  # [n]

    def head(self, scale: float, softcap: float | None) -> Head:
        return Head(torch.empty(self.scores.shape[1], 1), None, scale, softcap)

    def in_wide_rows(self, extra: int) -> Tensor:
        """The scores in rows with more room, which holds NaN."""
        rows = torch.full((ROWS, self.scores.shape[1] + extra), torch.nan, dtype=self.scores.dtype)
        rows[:, : self.scores.shape[1]] = self.scores
        return rows

    def loss_and_gradient_(self, rows: Tensor, head: Head, uniform: bool, **options: Any) -> Tensor:
        rest = self.ids, self.mask, self.target, self.tail, self.weights
        return kernels.loss_and_gradient_(rows, head, *rest, is_uniform=uniform, **options)

    def dense(self, head: Head, uniform: bool) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64, of the same rounded scores."""
        scores = self.scores.double().requires_grad_()
        logits = head.from_scores(scores)
        losses = torch.stack([self._dense_row(n, logits[n], uniform) for n in range(ROWS)])
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        return losses.detach(), gradient

    def _dense_row(self, n: int, logits: Tensor, uniform: bool) -> Tensor:
        support = self.ids[n][self.mask[n]]
        log_probs = logits.log_softmax(0)
        target = self.target[n].double()[self.mask[n]]
        is_outside = torch.ones(len(logits), dtype=torch.bool)
        is_outside[support] = False
        loss = -torch.where(target > 0, target * log_probs[support], 0).sum()
        if is_outside.any() and self.tail[n] > 0:
            outside = logits[is_outside].logsumexp(0) - logits.logsumexp(0)
            level = log_probs[is_outside].mean() if uniform else outside
            loss = loss - self.tail[n].double() * level
        return self.weights[n].double() * loss


def make(vocab_size: int, support: int, dtype: torch.dtype, kind: str = "plain") -> Case:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ids = rand(ROWS, vocab_size).argsort(1)[:, :support]
    mask = torch.arange(support) < torch.randint(1, support + 1, (ROWS, 1), generator=generator)
    ids = torch.where(mask, ids, ids[:, :1])
    target, tail, weights = torch.where(mask, rand(ROWS, support), 0), rand(ROWS), rand(ROWS) + 0.5
    scores = 3 * torch.randn(ROWS, vocab_size, generator=generator)
    match kind:
        case "zeros":  # no tail, probabilities of 0, weights of 0
            tail[::2], target[:, 0], target[1], weights[::3] = 0, 0, 0, 0
        case "ties":
            scores = scores.round()
        case "peaked":  # float32 holds no e^−200
            scores.scatter_add_(1, ids, torch.full_like(target, 200))
        case "low":
            scores -= 500
    total = (target.sum(1) + tail).clamp(min=1e-9)
    return Case(scores.to(dtype), ids, mask, target / total[:, None], tail / total, weights)


DTYPES = [torch.float32, torch.bfloat16]
FORMS = [(1.0, None), (0.5, 3.0), (0.25, None)]
SIZES = [(50, 1), (129, 8), (300, 65)]
CASES = list(
    itertools.product(DTYPES, ["plain", "ties", "zeros", "peaked", "low"], FORMS, [False, True])
)


@pytest.mark.parametrize(
    ("dtype", "kind", "form", "uniform", "size"),
    [(*case, SIZES[(i + i // 6) % 3]) for i, case in enumerate(CASES)],
)
def test_loss_and_gradient(
    dtype: torch.dtype, kind: str, form: Any, uniform: bool, size: tuple[int, int]
) -> None:
    case = make(*size, dtype, kind)
    head = case.head(*form)
    wanted, wanted_gradient = case.dense(head, uniform)
    rows = case.in_wide_rows(extra=7)
    losses = case.loss_and_gradient_(rows, head, uniform, block=64)

    largest = float(wanted.abs().max().clamp(min=1))
    torch.testing.assert_close(losses.double(), wanted, rtol=3e-6, atol=3e-6 * largest)
    bound = 3e-6 if dtype == torch.float32 else BFLOAT16
    torch.testing.assert_close(
        rows[:, : size[0]].double(), wanted_gradient, rtol=bound, atol=3e-7 * max(1, largest / 10)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "peaked", "low", "ties"])
@pytest.mark.parametrize("form", FORMS)
def test_the_summary(dtype: torch.dtype, kind: str, form: Any) -> None:
    case = make(301, 9, dtype, kind)
    head, rows = case.head(*form), case.in_wide_rows(extra=19)
    before = rows.clone()
    support, outside, entropy = kernels.summarise(rows, head, case.ids, case.mask, block=64)

    torch.testing.assert_close(rows, before, rtol=0, atol=0, equal_nan=True)
    logits = head.from_scores(case.scores.double())
    wanted = torch.where(case.mask, logits.gather(1, case.ids), -torch.inf)
    torch.testing.assert_close(support.double(), wanted, rtol=1e-5, atol=1e-5)
    others = logits.scatter(1, case.ids, -torch.inf)
    torch.testing.assert_close(outside.double(), others.logsumexp(1), rtol=1e-6, atol=2e-5)
    log_probs = others.log_softmax(1)
    terms = torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs, 0)
    torch.testing.assert_close(entropy.double(), -terms.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_support_that_is_the_whole_vocabulary(uniform: bool) -> None:
    made = make(40, 40, torch.float32)
    case = Case(
        made.scores,
        torch.arange(40).repeat(ROWS, 1),
        torch.ones(ROWS, 40, dtype=torch.bool),
        torch.full((ROWS, 40), 1 / 40),
        torch.zeros(ROWS),
        made.weights,
    )
    wanted, wanted_gradient = case.dense(case.head(1.0, None), uniform)
    rows = case.in_wide_rows(extra=0)
    losses = case.loss_and_gradient_(rows, case.head(1.0, None), uniform, block=16)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.double(), wanted_gradient, rtol=1e-5, atol=1e-6)
    _, outside, entropy = kernels.summarise(
        case.in_wide_rows(extra=0), case.head(1.0, None), case.ids, case.mask, block=16
    )
    assert (outside == -torch.inf).all()
    assert (entropy == 0).all()


@pytest.mark.parametrize("has_tail", [True, False])
def test_scores_that_are_not_finite_give_such_a_loss(has_tail: bool) -> None:
    case = make(60, 5, torch.float32)
    outside = [next(k for k in range(60) if k not in case.ids[n]) for n in range(ROWS)]
    case.scores[1, outside[1]] = torch.nan
    case.scores[2, case.ids[2, 0]] = torch.nan
    case.scores[3, outside[3]] = torch.inf
    if not has_tail:
        case.tail.zero_()
    rows = case.in_wide_rows(extra=4)
    losses = case.loss_and_gradient_(rows, case.head(1.0, None), uniform=False, block=16)
    assert losses.isfinite().tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_scaling(size: int) -> None:
    values = torch.randn(size)
    assert torch.equal(kernels.scale_(values.clone(), torch.tensor(1.0)), values)
    scaled = kernels.scale_(values.clone(), torch.tensor(0.3))
    torch.testing.assert_close(scaled, values * 0.3)
