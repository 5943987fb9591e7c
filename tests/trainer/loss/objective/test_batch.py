"""What a batch is made of: examples that count by themselves, and none at all."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.batch import padded_batch
from torch.nn.functional import one_hot

from .dense import EXACT, V
from .folders import CASES, loss_and_gradient, objective_for, over, to_dtype


def one_token_example(name: str, observed: list[int], base_probs: list[float]) -> TargetExample:
    """An example of a `base-observed` folder, each of its tokens but the first supervised."""
    count = len(observed)
    return TargetExample(
        id=name,
        input_ids=np.array([0, *observed], np.int32),
        positions=np.arange(1, count + 1, dtype=np.int32),
        trust=np.ones(count, np.float32),
        counts=np.ones(count, np.int32),
        support_ids=np.array(observed, np.int32),
        support_probs=np.array(base_probs, np.float32),
        tail_mass=1 - np.array(base_probs, np.float32),
        weights=np.ones(count, np.float32),
    )


def test_iw_sft_takes_its_mean_over_each_example() -> None:
    """By hand: √(2·½) = 1 where a mean over the batch is 4.8, and 64 capped."""
    batch = padded_batch(
        [
            one_token_example("none", [], []),
            one_token_example("two", [1, 2], [0.25, 0.5]),
            one_token_example("nothing", [], []),
            one_token_example("one", [3], [0.125]),
            one_token_example("capped", [1, 2, 3], [2**-8, 2**-8, 2**-8]),
            one_token_example("last", [], []),
        ]
    )
    targets = to_dtype(batch.targets, torch.float64)
    p = torch.tensor([0.125, 0.5, 0.25, 0.125]).double().expand(6, 4)
    leaf = p.log().requires_grad_()
    loss = objective_for("iw-sft", "live", {"T": 1.0})(leaf, targets)
    # p/b: 2 and 0.5; 1; 128, 64 and 32
    weights = torch.tensor([1.0, 1.0, 1.0, 16.0, 16.0, 16.0]).double()
    assert batch.targets.example_of.tolist() == [1, 1, 3, 4, 4, 4]
    nll = -torch.tensor([0.5, 0.25, 0.125, 0.5, 0.25, 0.125]).double().log()
    assert loss.sum.item() == pytest.approx(float((weights * nll).sum()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum, leaf)
    expected = weights[:, None] * (p - one_hot(targets.observed_ids, 4))
    torch.testing.assert_close(gradient, expected, **EXACT)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_iw_sft_of_a_batch_is_that_of_its_examples_alone(
    lengths: list[int], temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    examples = [
        one_token_example(
            str(i), [int(y) for y in rng.integers(0, V, n)], [float(b) for b in rng.random(n)]
        )
        for i, n in enumerate(lengths)
    ]
    logits = torch.tensor(rng.normal(0, 2, (sum(lengths), V)))
    objective = objective_for("iw-sft", "live", {"T": temperature})
    targets = to_dtype(padded_batch(examples).targets, torch.float64)
    whole, gradient = loss_and_gradient(objective, logits, targets)
    total, start = 0.0, 0
    for example in examples:
        stop = start + len(example.positions)
        own = to_dtype(padded_batch([example]).targets, torch.float64)
        part, own_gradient = loss_and_gradient(objective, logits[start:stop], own)
        torch.testing.assert_close(gradient[start:stop], own_gradient, **EXACT)
        if stop > start:
            observed = torch.tensor(example.observed_ids).long()[:, None]
            log_p = logits[start:stop].log_softmax(1).gather(1, observed)[:, 0]
            log_b = torch.tensor(example.support_probs).double().log()
            weight = min(16.0, math.exp(temperature * float((log_p - log_b).mean())))
            assert part.sum.item() == pytest.approx(-weight * float(log_p.sum()), rel=1e-10)
        total, start = total + part.sum.item(), stop
    assert whole.sum.item() == pytest.approx(total, rel=1e-10)


@over(CASES)
def test_no_positions_give_a_zero_with_a_gradient(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits = torch.zeros(0, V, requires_grad=True)
    loss = objective_for(name, form, parameters)(logits, padded_batch([]).targets)
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert logits.grad is not None
    if loss.error_bounds is not None:
        assert loss.error_bounds.shape == (0,)
