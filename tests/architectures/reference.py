"""What training should compute for any model: each example by itself, the loss from its definition.

N supervised positions of an example, V vocabulary, S entries of a support.
"""

from typing import Any

import numpy as np
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import Batch
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.student import Student
from torch import Tensor

OBJECTIVE = Objective(choose("sft+kl"), "student", "base")
_LENGTHS = (9, 21, 13, 5)  # longer and shorter than the windows of the models
_SHARED = 4  # tokens at the beginning of all

Examples = list[TargetExample]
Gradients = dict[str, Tensor]


def make_examples(vocab_size: int) -> Examples:
    """Examples with a common beginning and random targets."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, vocab_size, _SHARED)
    return [
        _example(rng, np.append(shared, rng.integers(3, vocab_size, length)), vocab_size)
        for length in _LENGTHS
    ]


def _example(rng: np.random.Generator, tokens: Any, vocab_size: int) -> TargetExample:
    positions = np.arange(_SHARED + 1, len(tokens))
    counts = rng.integers(1, 6, len(positions))
    supports, probs, tails = [], [], []
    for position, size in zip(positions, counts, strict=True):
        others = rng.permutation(np.delete(np.arange(vocab_size), tokens[position]))[: size - 1]
        *masses, tail = rng.dirichlet(np.ones(size + 1))
        supports.append(np.append(others, tokens[position]))
        probs.append(masses)
        tails.append(tail)
    return TargetExample(
        id=f"of {len(tokens)} tokens",
        input_ids=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        trust=rng.uniform(0.5, 1, len(positions)).astype(np.float32),
        counts=counts.astype(np.int32),
        support_ids=np.concatenate(supports).astype(np.int32),
        support_probs=np.concatenate(probs).astype(np.float32),
        tail_mass=np.array(tails, np.float32),
        weights=rng.uniform(0.5, 1.5, len(positions)).astype(np.float32),
    )


def logits_alone(model: Any, example: TargetExample) -> Tensor:
    """The model's own logits at the supervised positions of one unpadded example, [N, V]."""
    input_ids = torch.from_numpy(example.input_ids).long()[None]
    return model(input_ids=input_ids, use_cache=False).logits[0, example.positions - 1]


def dense_loss(logits_NV: Tensor, example: TargetExample) -> Tensor:
    """Σ weight·(−Σ_v Q(v) log p(v)) in float64, the tail of Q one bucket."""
    log_probs_NV = logits_NV.double().log_softmax(-1)
    ends = np.cumsum(example.counts)
    total = log_probs_NV.new_zeros(())
    for n, (end, count) in enumerate(zip(ends, example.counts, strict=True)):
        ids_S = torch.from_numpy(example.support_ids[end - count : end]).long()
        residual_S = torch.from_numpy(example.support_probs[end - count : end]).double()
        trust = float(example.trust[n])
        observed = log_probs_NV[n, int(example.input_ids[example.positions[n]])]
        tail = torch.log1p(-log_probs_NV[n, ids_S].exp().sum())
        others = residual_S @ log_probs_NV[n, ids_S] + float(example.tail_mass[n]) * tail
        loss = -trust * observed - (1 - trust) * others
        total = total + float(example.weights[n]) * loss
    return total


def reference_gradients(model: Any, examples: Examples) -> tuple[Tensor, Gradients]:
    """The loss of all examples and its gradients, each example by itself."""
    model.zero_grad()
    total = sum(dense_loss(logits_alone(model, each), each) for each in examples)
    assert isinstance(total, Tensor)
    total.backward()
    return total.detach(), _gradients(model)


def own_gradients(student: Student, batch: Batch) -> tuple[Tensor, Gradients]:
    """The loss of a batch and its gradients, as in training."""
    student.zero_grad()
    loss, _ = student(batch, OBJECTIVE)
    loss.backward()
    return loss.detach(), _gradients(student.model)


def _gradients(model: Any) -> Gradients:
    named = model.named_parameters()
    return {name: each.grad.clone() for name, each in named if each.grad is not None}


def largest_error(found: Gradients, expected: Gradients) -> float:
    """The largest error of a gradient, as a share of the largest gradient."""
    assert found.keys() == expected.keys()
    errors = [(found[name].double() - expected[name]).abs().max() for name in expected]
    return float(max(errors) / max(each.abs().max() for each in expected.values()))
