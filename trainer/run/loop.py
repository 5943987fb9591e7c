"""The training loop: load; while steps are left: step, evaluate, save; evaluate again."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
from tqdm import tqdm

from ...pipeline.errors import UserError
from ...pipeline.progress import progress_bar
from ...pipeline.signals import Terminated
from ...pipeline.storage.json_files import refuse_misfits, write_json
from ...pipeline.threads import Prefetch
from ..data.batch import Batch
from ..data.steps import RunSize, StepLoader
from ..loss.course import Course
from ..models.saving import saved_dtype
from ..settings import TrainSettings
from ..step.ahead import on_device
from ..step.distributed import is_sharded, true_on_any_rank
from ..step.evaluate import Evaluation
from ..step.optimizer import learning_rate_factor
from ..step.step import NOT_FINITE, NotFiniteError, Stepper, StepResult
from .checkpoint import Checkpoints
from .evaluator import Evaluator
from .folder import RUN, Log, open_log

STEPS_AHEAD = 2  # that are read and collated while one is computed


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run; `tokens` and `seconds` are those of its optimizer steps alone."""

    steps: int
    examples: int
    tokens: int  # supervised ones
    seconds: float
    before: Evaluation | None
    after: Evaluation | None
    was_done: bool = False  # by an earlier run: nothing was trained now


def result_from(folder: Path, results: dict[str, Any]) -> TrainResult:
    """The result of an earlier run, from its record. Raises UserError if that is damaged."""
    with refuse_misfits(folder / RUN, "record of a run", f"remove {folder}"):
        return msgspec.convert(results | {"was_done": True}, TrainResult)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A student in training, on one of the processes."""

    settings: TrainSettings
    size: RunSize
    stepper: Stepper
    loader: StepLoader
    evaluator: Evaluator
    checkpoints: Checkpoints
    course: Course

    def train(self, must_end: Callable[[], bool] = lambda: False) -> TrainResult:
        """Take the steps that are left, then round the weights to the precision they are saved in.

        Once `must_end` returns true on any process, saves a checkpoint and raises Terminated.
        """
        progress = self.checkpoints.load()
        self._follow(progress.step)
        has_loss = progress.step > 0
        with self._log(progress.step) as log, self._bar(progress.step) as bar:
            if progress.step == 0:
                progress = replace(progress, before=self.evaluator.evaluate(0, log))
            left = self.loader.steps_between(progress.samples, self.size.samples)
            made = on_device(self.loader.load(left), self.stepper.accelerator.device)
            with Prefetch(made, STEPS_AHEAD) as ready:
                for step, batches in ready:
                    if true_on_any_rank(must_end(), self.stepper.accelerator):
                        self.checkpoints.save(progress)
                        raise Terminated
                    start = perf_counter()
                    result = self._step(progress.step + 1, batches)
                    seconds = perf_counter() - start
                    has_loss = has_loss or result.loss != 0
                    progress = progress.after(step.stop, result.tokens, seconds)
                    self._report(progress.step, result, seconds, ready.waited, log, bar)
                    self.evaluator.evaluate_if_due(progress.step, log)
                    self.checkpoints.save_if_due(progress)
            if not has_loss:
                raise UserError(
                    "nothing was trained: the loss of every step was 0, as every token of the "
                    "targets has the weight 0: score demonstrations with other weights"
                )
            self._round_weights()
            after = self.evaluator.evaluate(self.size.steps, log)
        return TrainResult(*self.size, progress.tokens, progress.seconds, progress.before, after)

    def _follow(self, step: int) -> None:
        """Take the objective of a step, counted from 1; before the first, it is the first's."""
        self.stepper.objective = self.course.at(max(step - 1, 0) / max(self.size.steps - 1, 1))

    def _step(self, number: int, batches: list[Batch]) -> StepResult:
        self._follow(number)
        try:
            return self.stepper.step(number, batches, self._learning_rate(number))
        except NotFiniteError as error:
            if self.stepper.accelerator.is_main_process:
                write_json(self.settings.out / NOT_FINITE, error.record)
            raise

    def _learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup_steps = round(self.settings.warmup_ratio * self.size.steps)
        factor = learning_rate_factor(
            step - 1, self.size.steps, warmup_steps, self.settings.schedule
        )
        return self.settings.learning_rate * factor

    def _report(
        self, step: int, result: StepResult, seconds: float, waited: float, log: Log, bar: tqdm
    ) -> None:
        """Log a step and show it in the bar."""
        speed = result.tokens / seconds
        log(
            event="step",
            step=step,
            learning_rate=self._learning_rate(step),
            tokens_per_second=speed,
            seconds_waited_in_all=waited,
            **asdict(result),
        )
        bar.set_postfix_str(f"loss {result.loss:.4f}, {speed:.0f} tok/s")
        bar.update()

    def _round_weights(self) -> None:
        """Round the weights to those that are saved; an adapter that is not merged stays as it is.

        An adapter of a sharded model is merged only when it is saved.
        """
        student = self.stepper.student
        stays_apart = self.settings.keep_adapter or is_sharded(student)
        if not (student.has_adapter and stays_apart):
            student.finish(saved_dtype(self.evaluator.base))

    def _log(self, step: int) -> AbstractContextManager[Log]:
        is_main, identity = self.stepper.accelerator.is_main_process, self.checkpoints.identity
        return open_log(self.settings.out, is_main, step, self.settings.track, identity)

    def _bar(self, step: int) -> tqdm:
        is_main = self.stepper.accelerator.is_main_process
        return progress_bar(
            total=self.size.steps, initial=step, desc="train", unit="step", disable=not is_main
        )
