"""A student in training: its steps, its place in the data, its checkpoints.

The samples of all epochs form one sequence, cut into optimizer steps; only the last may be smaller.
A step's samples, and so its gradient, are the same on any number of processes.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import tee
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Identity
from ...pipeline.format.records import TargetExample
from ...pipeline.progress import progress_bar
from ...pipeline.signals import Terminated
from ...pipeline.storage.json_files import write_json
from ..data.batch import Batch, collate, observed_only, pack
from ..data.prefetch import Prefetch
from ..data.steps import Samples, Step, micro_batches, read_steps, steps_of_samples, steps_of_tokens
from ..data.stream import TargetStream
from ..loss.objective import Objective
from ..models.files import ModelFiles
from ..models.saving import save_model, saved_dtype
from ..models.student import Student
from ..settings import TrainSettings
from ..step.distributed import is_sharded
from ..step.evaluate import Evaluation, evaluate
from ..step.optimizer import learning_rate_factor
from ..step.step import NOT_FINITE, NotFiniteError, Stepper
from .checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from .eval_command import run_command
from .folder import RUN, Log, open_log
from .target_folders import in_order

EVAL_MODEL = ".eval-model.tmp"  # in the run's folder, while --eval-command runs
STEPS_AHEAD = 2  # that are read and collated while one is computed


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run went; `tokens` and `seconds` are of its optimizer steps, evaluations left out."""

    steps: int
    examples: int
    tokens: int  # supervised ones
    seconds: float
    before: Evaluation | None
    after: Evaluation | None
    was_done: bool = False  # by an earlier run: nothing was trained now


class Run:
    """A student in training, on one of the processes."""

    def __init__(
        self,
        settings: TrainSettings,
        identity: Identity,
        accelerator: Accelerator,
        student: Student,
        base: ModelFiles,
        objective: Objective,
        train_samples: Samples,
        eval_streams: Sequence[TargetStream],
    ) -> None:
        self.settings = settings
        self.identity = identity
        self.accelerator = accelerator
        self.student = student
        self.base = base
        self.objective = objective
        self.train_samples = train_samples
        self.eval_streams = eval_streams
        self.stepper = Stepper(accelerator, student, settings, self.objective)
        self.steps, self.samples = run_size(settings, train_samples)

    def train(self, must_end: Callable[[], bool] = lambda: False) -> TrainResult:
        """Take every step that is left; a whole model's weights end rounded to what is saved.

        Raises Terminated, a checkpoint written, where this or another process must end before.
        """
        progress = self._resumed()
        is_main = self.accelerator.is_main_process
        bar = progress_bar(
            total=self.steps,
            initial=progress.step,
            desc="train",
            unit="step",
            disable=not is_main,
        )
        log_to = (self.settings.out, is_main, progress.step, self.settings.track, self.identity)
        with open_log(*log_to) as log, bar as shown:
            if progress.step == 0:
                progress = replace(progress, before=self._evaluate(0, log))
            progress = self._take_steps(progress, log, shown, must_end)
            stays_apart = self.settings.keep_adapter or is_sharded(self.student)
            if not (self.student.has_adapter and stays_apart):  # merged when saved, if at all
                self.student.finish(saved_dtype(self.base))
            after = self._evaluate(self.steps, log)
        return TrainResult(
            self.steps, self.samples, progress.tokens, progress.seconds, progress.before, after
        )

    def _take_steps(
        self, progress: Progress, log: Log, shown: tqdm, must_end: Callable[[], bool]
    ) -> Progress:
        saved = progress.step
        with Prefetch(self._batches(self._plans(progress)), STEPS_AHEAD) as ready:
            for step, batches in ready:
                if self._anywhere(must_end()):
                    if progress.step > saved:
                        self._save(progress)
                    raise Terminated
                progress = self._step(progress, step, batches, ready.waited, log, shown)
                if self._is_due(self.settings.save_every, progress.step):
                    self._save(progress)
                    saved = progress.step
        return progress

    def _anywhere(self, is_so: bool) -> bool:
        """Whether something is so on any of the processes."""
        flag = torch.tensor(int(is_so)).to(self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _step(
        self,
        progress: Progress,
        step: Step,
        batches: list[Batch],
        waited: float,
        log: Log,
        shown: tqdm,
    ) -> Progress:
        """Take one step, and evaluate where that is due after it."""
        number = progress.step + 1
        learning_rate = self._learning_rate(number)
        start = perf_counter()
        try:
            result = self.stepper.step(number, batches, learning_rate)
        except NotFiniteError as error:
            if self.accelerator.is_main_process:
                write_json(self.settings.out / NOT_FINITE, error.record)
            raise
        seconds = perf_counter() - start
        speed = result.tokens / seconds
        log(
            event="step",
            step=number,
            learning_rate=learning_rate,
            tokens_per_second=speed,
            seconds_waited_in_all=waited,
            **asdict(result),
        )
        shown.set_postfix_str(f"loss {result.loss:.4f}, {speed:.0f} tok/s")
        shown.update()
        progress = replace(
            progress,
            step=number,
            samples=step.stop,
            tokens=progress.tokens + result.tokens,
            seconds=progress.seconds + seconds,
        )
        if self._is_due(self.settings.eval_every, number):
            self._evaluate(number, log)
        return progress

    def _resumed(self) -> Progress:
        """The progress of the latest checkpoint, its state taken over; none at the start."""
        path = latest_checkpoint(self.settings.out, self.identity)
        if path is None:
            return Progress()
        return load_checkpoint(path, self.accelerator, self.stepper.model, self.stepper.optimizer)

    def _save(self, progress: Progress) -> None:
        save_checkpoint(
            self.settings.out,
            self.identity,
            self.accelerator,
            self.stepper.model,
            self.stepper.optimizer,
            progress,
            self.settings.keep_checkpoints,
        )

    def _plans(self, progress: Progress) -> Iterator[tuple[Step, list[list[int]]]]:
        """The steps that are left, and this process' micro-batches in each."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        tokens, packed = self.settings.forward_tokens, self.settings.pack
        for step in cut(self.settings, self.train_samples, progress.samples, self.samples):
            yield step, micro_batches(step, rank, world_size, tokens, packed)

    def _batches(
        self, plans: Iterable[tuple[Step, list[list[int]]]]
    ) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps with their micro-batches, read."""
        plans, ahead = tee(plans)
        numbers = (numbers for _, numbers in ahead)
        examples = read_steps(self.train_samples, self.settings.seed, numbers)
        for (step, _), chunks in zip(plans, examples, strict=True):
            yield step, [self._batch(chunk) for chunk in chunks]

    def _batch(self, examples: list[TargetExample]) -> Batch:
        """Examples as a batch with the targets of the method."""
        batch = pack(examples) if self.settings.pack else collate(examples)
        if self.objective.tokens_alone:
            return replace(batch, targets=observed_only(batch.targets))
        return batch

    def _learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup_steps = round(self.settings.warmup_ratio * self.steps)
        factor = learning_rate_factor(step - 1, self.steps, warmup_steps, self.settings.schedule)
        return self.settings.learning_rate * factor

    def _is_due(self, every: int | None, step: int) -> bool:
        """Whether something is due between this step and the next."""
        return every is not None and step % every == 0 and step < self.steps

    def _evaluate(self, step: int, log: Log) -> Evaluation | None:
        """How the student does after a step, on the held-out examples and by the user's command."""
        evaluation = self._on_held_out() if any(map(len, self.eval_streams)) else None
        if evaluation is not None:
            log(event="evaluation", step=step, **asdict(evaluation))
        if self.settings.eval_command is not None:
            self._run_eval_command(self.settings.eval_command, step, log)
        return evaluation

    def _on_held_out(self) -> Evaluation:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        examples = in_order(self.eval_streams, rank, world_size)
        chunks = by_tokens(examples, self.settings.forward_tokens)
        batches = (self._batch(chunk) for chunk in chunks)
        return evaluate(self.student, batches, self.accelerator, self.objective)

    def _run_eval_command(self, command: str, step: int, log: Log) -> None:
        """Let the user's command look at the model as it is, while the other processes wait."""
        folder = self.settings.out / EVAL_MODEL
        is_main = self.accelerator.is_main_process
        said: dict[str, Any] = {}
        try:
            save_model(self.student, self.base, folder, is_main)
            if is_main:
                said = run_command(command, folder)
        except UserError as error:
            said = {"error": str(error)}
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        log(event="eval_command", step=step, **said)
        if "error" in said:
            tqdm.write(f"step {step}: --eval-command failed: {said['error']}", file=sys.stderr)
        self.accelerator.wait_for_everyone()


def run_size(settings: TrainSettings, stream: Samples) -> tuple[int, int]:
    """The steps of a run and the samples they take, repetitions counted."""
    samples = max(1, round(settings.epochs * len(stream)))
    if settings.step_tokens is None:  # then no length needs to be looked at
        steps = -(-samples // settings.batch_size)
        steps = min(steps, settings.max_steps or steps)
        return steps, min(samples, steps * settings.batch_size)
    steps = taken = 0
    for step in cut(settings, stream, 0, samples):
        if steps == settings.max_steps:
            break
        steps, taken = steps + 1, step.stop
    return steps, taken


def cut(settings: TrainSettings, stream: Samples, start: int, stop: int) -> Iterator[Step]:
    """The samples from `start` to `stop` as steps."""
    lengths = stream.lengths(settings.seed, range(start, stop))
    if settings.step_tokens is not None:
        return steps_of_tokens(lengths, start, settings.step_tokens)
    return steps_of_samples(lengths, start, settings.batch_size)


def by_tokens(examples: Iterable[TargetExample], tokens: int) -> Iterator[list[TargetExample]]:
    """Consecutive examples of at most so many padded tokens, but at least one."""
    chunk: list[TargetExample] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.input_ids))
        if chunk and longest * (len(chunk) + 1) > tokens:
            yield chunk
            chunk, longest = [], len(example.input_ids)
        chunk.append(example)
    if chunk:
        yield chunk


def result_from(folder: Path, results: dict[str, Any]) -> TrainResult:
    """The results of an earlier run, from its record. Raises UserError where that is damaged."""
    try:
        evaluations = {
            name: None if results[name] is None else Evaluation(**results[name])
            for name in ("before", "after")
        }
        numbers = {name: value + 0 for name, value in results.items() if name not in evaluations}
        return TrainResult(**{**numbers, **evaluations, "was_done": True})
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / RUN}: damaged, no record of a run: remove {folder}") from error
