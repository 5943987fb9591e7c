"""Evaluation of a model on held-out targets."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from ...pipeline.methods import rules
from ..data.batch import Batch, SparseTargets, padded_batch
from ..loss.objective import Objective
from ..loss.sparse import at_least_float32, observed_losses, residual_divergences
from ..models.student import Student
from .distributed import reshard
from .step import room_for


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over all supervised tokens of all processes; losses and entropy in nats.

    - `target_loss`: the loss that training minimises.
    - `nll`: −log p(y), of the demonstrations alone.
    - `kl_to_base`: KL(base ‖ student) over the stored support, the rest as one bucket; None where
      the targets' residual is not the base prior.
    - `trust`: the method's γ, at the present student if the method is live; 1 where the folder
      holds γ in its weights (frozen-weight), None where a method has none (gem).
    - `tail_mass`: the target's mass outside the stored support, where only its sum is known.
    - `entropy`: of the student over the whole vocabulary; a fall shows overconfidence.
    """

    tokens: int
    target_loss: float
    nll: float
    kl_to_base: float | None
    trust: float | None
    tail_mass: float
    entropy: float


@torch.no_grad()
def evaluate(
    student: Student, batches: Iterable[Batch], accelerator: Accelerator, objective: Objective
) -> Evaluation:
    """Evaluate on the batches of all processes; every process calls it with its own."""
    was_training = student.training
    student.eval()
    read = partial(_sums, objective=objective)
    sums = [0.0] * 7
    for batch in _in_step(batches, accelerator):
        with room_for("evaluation", "fewer --forward-tokens"), accelerator.autocast():
            found = student.measure(batch.to(accelerator.device), read, objective.reads_examples)
        sums = [a + b for a, b in zip(sums, found.tolist(), strict=True)]
    student.train(was_training)
    reshard(student)
    tokens, *totals = _of_all(sums, accelerator)
    target_loss, nll, divergence, trust, tail_mass, entropy = (total / tokens for total in totals)
    return Evaluation(
        round(tokens),
        target_loss,
        nll,
        divergence if objective.residual == "base" else None,
        trust if objective.has_trust else None,
        tail_mass,
        entropy,
    )


def _sums(logits_nV: Tensor, targets: SparseTargets, objective: Objective) -> Tensor:
    """The sums over some positions that the means are computed from, [7]."""
    logits_nV = at_least_float32(logits_nV)
    followed = objective.followed(logits_nV, targets).targets
    nothing = logits_nV.new_zeros(())
    residual_is_base = objective.residual == "base"
    return torch.stack(
        [
            nothing + len(logits_nV),
            objective(logits_nV, targets).sum,
            observed_losses(logits_nV, targets).sum(),
            residual_divergences(logits_nV, targets).sum() if residual_is_base else nothing,
            objective.trust(logits_nV, targets).sum() if objective.has_trust else nothing,
            ((1 - followed.trust) * followed.tail_mass).sum(),
            rules.entropy(logits_nV.log_softmax(1)).sum(),
        ]
    )


def _in_step(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[Batch]:
    """The batches, then empty ones until every process has run out of them.

    All processes must take part whenever sharded weights are gathered.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        (is_left,) = _of_all([float(batch is not None)], accelerator)
        if not is_left:
            return
        yield batch or padded_batch([])


def _of_all(values: list[float], accelerator: Accelerator) -> list[float]:
    """The sums over all processes, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return values
    has_float64 = accelerator.device.type != "mps"
    dtype = torch.float64 if has_float64 else torch.float32
    local: Tensor = torch.tensor(values, dtype=dtype, device=accelerator.device)
    total: Tensor = accelerator.reduce(local, "sum")  # pyright: ignore[reportAssignmentType]
    return total.tolist()
