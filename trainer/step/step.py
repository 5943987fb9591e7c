"""One optimizer step, on one process or many.

It takes the gradient of

    (sum of weight·loss over all supervised tokens of the step) / (their number)

over all micro-batches and processes, so the same samples give the same step, whatever the
micro-batches and the number of processes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ...pipeline.errors import UserError
from ..data.batch import Batch, SparseTargets
from ..loss.objective import Objective
from ..models.student import Student
from ..settings import TrainSettings
from .ahead import without_waiting
from .distributed import gathered, shard
from .optimizer import make_optimizer

NOT_FINITE = "not-finite.json"  # in the run's folder: the step and the examples of the error
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss per token in nats, norm of the gradient before clipping, supervised tokens.

    `error_bound` is the mean over the tokens of the bound ‖ĝ − g‖₁ by which a truncated teacher
    may change the gradient with respect to the logits; None where it does not change.
    """

    loss: float
    grad_norm: float
    tokens: int
    error_bound: float | None = None


class NotFiniteError(UserError):
    """A loss or a gradient that is not finite, and the examples that caused it."""

    def __init__(self, step: int, loss: float, examples: list[str]) -> None:
        what = "gradient" if math.isfinite(loss) else f"loss ({loss})"
        more = len(examples) - _MOST_NAMED
        named = ", ".join(examples[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
        super().__init__(
            f"step {step}: the {what} is not finite on examples {named}: look at them (their ids "
            f"are in {NOT_FINITE}), or give a lower --learning-rate and another --out"
        )
        self.record = {"step": step, "what": what, "examples": examples}


class Stepper:
    """A student and its optimizer, the same on every process."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        settings: TrainSettings,
        objective: Objective,
    ) -> None:
        self.accelerator = accelerator
        self.student = student
        self.max_grad_norm = settings.max_grad_norm
        self.objective = objective
        given = (settings.optimizer, student, settings.learning_rate, settings.weight_decay)
        with room_for("the model", "--lora-rank, or --fsdp on several GPUs"):
            if settings.fsdp and accelerator.num_processes > 1:
                shard(student, accelerator)
                self.model: Any = student
                self.optimizer: Any = accelerator.prepare(make_optimizer(*given))
            else:
                self.model, self.optimizer = accelerator.prepare(student, make_optimizer(*given))

    def step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Take step `number` on this process' micro-batches, at least one.

        Raises NotFiniteError, before any weight changes, where the loss or its gradient is not
        finite.
        """
        own = torch.tensor(sum(batch.tokens for batch in batches))
        tokens = self._sum(without_waiting(own, self.accelerator.device))
        # the gradients are averaged over the processes; their sum is wanted
        share = self.accelerator.num_processes / tokens
        with room_for(
            f"step {number}",
            "fewer --forward-tokens, which leaves the gradient as it is, or "
            "--gradient-checkpointing",
        ):
            sums, bounds = self._backward(batches, share)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        assert norm is not None  # only DeepSpeed does not return it
        numbers = [tokens, gathered(norm), self._mean(sums), *map(self._mean, bounds)]
        # the only time in a step that the host waits for the device
        count, grad_norm, loss, *error_bound = torch.stack([n.double() for n in numbers]).tolist()
        # float16 gradients may overflow: the loss scaler then skips the step and lowers the scale
        may_overflow = self.accelerator.scaler is not None
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_overflow):
            raise NotFiniteError(number, loss, _at_fault(batches, sums))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with room_for(  # its moments come with the first step
            "the optimizer", "--optimizer adamw-8bit, --lora-rank, or --fsdp on several GPUs"
        ):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, grad_norm, int(count), *error_bound)

    def _backward(self, batches: Sequence[Batch], share: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Add up the gradients; the weighted loss of each micro-batch, and its error bounds if any.

        Both are times `share`, the weight of a token in the gradient. It is a factor of the
        tokens' own weights, so the gradient of the loss is 1 and needs no pass over that of the
        head. In float16 it would make the gradients of logits vanish: there it scales the loss.
        """
        is_folded = self.accelerator.mixed_precision != "fp16"
        sums: list[Tensor] = []
        bounds: list[Tensor] = []
        for index, batch in enumerate(batches, start=1):
            is_last = index == len(batches)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                batch = batch.to(self.accelerator.device)
                if is_folded:
                    batch = replace(batch, targets=_weighted(batch.targets, share))
                with self.accelerator.autocast():
                    loss, error_bounds = self.model(batch, self.objective)
                loss = loss if is_folded else loss * share
                self.accelerator.backward(loss)
            sums.append(loss.detach())
            if error_bounds is not None:
                bounds.append(error_bounds.sum() if is_folded else error_bounds.sum() * share)
        return torch.stack(sums), [torch.stack(bounds)] if bounds else []

    def _mean(self, shares: Tensor) -> Tensor:
        """The mean over all tokens of the step, from this process' shares of it."""
        return self._sum(shares.sum()) / self.accelerator.num_processes

    def _sum(self, value: Tensor) -> Any:
        """The sum of a number over the processes, on the device."""
        return self.accelerator.reduce(value, "sum")


def _weighted(targets: SparseTargets, factor: Tensor) -> SparseTargets:
    return replace(targets, weights=targets.weights * factor)


@contextmanager
def room_for(what: str, way_out: str) -> Iterator[None]:
    """Turns an out-of-memory error of the device into a UserError that names the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what}: the device is out of memory: give {way_out}") from error


def _at_fault(batches: Sequence[Batch], sums: Tensor) -> list[str]:
    """The examples of the micro-batches whose loss is not finite; all examples if there is none."""
    own = [
        batch for batch, is_finite in zip(batches, sums.isfinite(), strict=True) if not is_finite
    ]
    at_fault = gather_object([example for batch in own for example in batch.ids])
    return at_fault or gather_object([example for batch in batches for example in batch.ids])
