"""How a model does on held-out targets."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .collate import Batch, SparseTargets
from .loss import observed_losses, residual_divergences
from .objective import Objective
from .student import Student


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over all supervised tokens, in nats.

    `kl_to_base` is the divergence KL(base ‖ student), where the targets' residual is the base prior
    (over its stored support, the rest as one bucket).
    """

    tokens: int
    target_loss: float
    nll: float
    kl_to_base: float | None


@torch.no_grad()
def evaluate(
    student: Student,
    batches: Iterable[Batch],
    device: torch.device,
    objective: Objective,
) -> Evaluation:
    """Evaluate on the batches of all processes; every one of them calls it with its own."""
    residual_is_base = objective.residual == "base"
    was_training = student.training
    student.eval()
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch in (batch.to(device) for batch in batches):
        for logits_nV, targets in _chunks(student, batch, objective):
            chunk_sums = [
                len(logits_nV),
                objective(logits_nV, targets).sum,
                observed_losses(logits_nV, targets).sum(),
                residual_divergences(logits_nV, targets).sum() if residual_is_base else 0.0,
            ]
            sums = [a + float(b) for a, b in zip(sums, chunk_sums, strict=True)]
    student.train(was_training)
    tokens, target_loss, nll, divergence = map(sum, zip(*gather_object([sums]), strict=True))
    return Evaluation(
        tokens=int(tokens),
        target_loss=target_loss / tokens,
        nll=nll / tokens,
        kl_to_base=divergence / tokens if residual_is_base else None,
    )


def _chunks(
    student: Student, batch: Batch, objective: Objective
) -> Iterable[tuple[Tensor, SparseTargets]]:
    """The logits of a batch in parts, but in one where a method reads whole examples."""
    if "sequence_log_ratio" in objective.choice.method.reads:
        return [(student.logits(batch), batch.targets)]
    return student.logit_chunks(batch)
