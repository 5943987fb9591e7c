"""The training run, from its settings to a saved model.

The samples of all epochs form one sequence, cut into optimizer steps; only the last may be smaller.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..pipeline.manifest import Identity, Manifest, read_manifest
from ..pipeline.progress import progress_bar
from ..pipeline.provenance import package_versions
from ..pipeline.records import TargetExample
from ..pipeline.runner import open_folder
from ..pipeline.storage import locked
from .checks import SFT, check_fit, check_streams, settled_method
from .collate import Batch, collate, observed_only
from .evaluate import Evaluation, evaluate
from .models import find_model
from .objective import objective_of
from .run_folder import Log, finish, finished_run, open_log, run_identity
from .schedule import learning_rate_factor
from .settings import TrainSettings
from .step import Stepper, precision_of, start_accelerator
from .stream import TargetStream, open_streams
from .student import Student, load_student, save_student, saved_dtype


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


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune a model on a target folder; returns at once where that was done before.

    Raises UserError where the targets do not fit the model, the output folder holds something else,
    or the loss stops being finite.
    """
    manifest = read_manifest(settings.targets, "build-targets")
    settings = replace(settings, method=settled_method(settings, manifest))
    base = find_model(settings.model, settings.revision)
    check_fit(settings, manifest, base)
    accelerator = start_accelerator(settings.precision)
    identity = run_identity(
        settings,
        inputs={"targets": manifest.fingerprint, "model": base.weights_hash()},
        precision=precision_of(accelerator),
        examples_per_step=_examples_per_step(settings, accelerator),
    )
    record = finished_run(settings.out, identity)
    if record is not None:
        return _result_from(record["results"])
    train_stream, eval_stream = open_streams(settings.targets, manifest, settings.eval_fraction)
    check_streams(settings, train_stream, eval_stream)
    with locked(settings.out) if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            open_folder(settings.out, identity)
        set_seed(settings.seed, device_specific=True)
        student = load_student(base, settings.gradient_checkpointing, settings.lora_rank)
        if student.head_form is None and accelerator.is_main_process:
            print(
                f"model {base.name}: the fused loss does not know its output head: the plain one "
                "runs, which takes more memory and time",
                file=sys.stderr,
            )
        run = Run(settings, accelerator, student, train_stream, eval_stream)
        result = run.train(saved_dtype(base))
        if accelerator.is_main_process:
            save_student(student, base, settings.out)
            finish(settings.out, _record(settings, manifest, identity, accelerator, result))
        accelerator.wait_for_everyone()
    return result


class Run:
    """A student in training, on one of the processes."""

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        student: Student,
        train_stream: TargetStream,
        eval_stream: TargetStream,
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.student = student
        self.train_stream = train_stream
        self.eval_stream = eval_stream
        assert settings.method is not None  # settled
        self.objective = objective_of(train_stream.manifest.settings, settings.method)
        self.stepper = Stepper(accelerator, student, settings, self.objective)
        per_step = _examples_per_step(settings, accelerator)
        self.examples = count_examples(settings, len(train_stream), per_step)
        self.steps = math.ceil(self.examples / per_step)

    def train(self, final_dtype: torch.dtype) -> TrainResult:
        """Take every step; the weights end rounded to `final_dtype` and are evaluated so."""
        tokens, seconds = 0, 0.0
        is_main = self.accelerator.is_main_process
        bar = progress_bar(total=self.steps, desc="train", unit="step", disable=not is_main)
        with open_log(self.settings.out, is_main) as log, bar as progress:
            before = self.evaluate(0, log)
            start = perf_counter()
            for step, batches in enumerate(self.micro_batches(), start=1):
                learning_rate = self.learning_rate(step)
                result = self.stepper.step(step, batches, learning_rate)
                duration = perf_counter() - start
                tokens, seconds = tokens + result.tokens, seconds + duration
                speed = result.tokens / duration
                log(
                    event="step",
                    step=step,
                    learning_rate=learning_rate,
                    tokens_per_second=speed,
                    **asdict(result),
                )
                progress.set_postfix_str(f"loss {result.loss:.4f}, {speed:.0f} tok/s")
                progress.update()
                if self.is_time_to_evaluate(step):
                    self.evaluate(step, log)
                start = perf_counter()
            self.student.finish(final_dtype)
            after = self.evaluate(self.steps, log)
        return TrainResult(self.steps, self.examples, tokens, seconds, before, after)

    def micro_batches(self) -> Iterator[list[Batch]]:
        """This process' batches of each step; an empty one where its samples have run out."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        shuffled = self.train_stream.shuffled(self.settings.seed, rank, world_size)
        batches = self.batches(islice(shuffled, len(range(rank, self.examples, world_size))))
        for _ in range(self.steps):
            yield list(islice(batches, self.settings.gradient_accumulation)) or [collate([])]

    def batches(self, examples: Iterator[TargetExample]) -> Iterator[Batch]:
        """Examples as batches with the targets of the method."""
        while chunk := list(islice(examples, self.settings.batch_size)):
            batch = collate(chunk)
            yield observed_only(batch) if self.settings.method == SFT else batch

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        warmup_steps = round(self.settings.warmup_ratio * self.steps)
        factor = learning_rate_factor(step - 1, self.steps, warmup_steps, self.settings.schedule)
        return self.settings.learning_rate * factor

    def is_time_to_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due between this step and the next."""
        every = self.settings.eval_every
        return every is not None and step % every == 0 and step < self.steps

    def evaluate(self, step: int, log: Log) -> Evaluation | None:
        """How the student does on the held-out examples, if there are any, after a step."""
        if len(self.eval_stream) == 0:
            return None
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        evaluation = evaluate(
            self.student,
            self.batches(self.eval_stream.in_order(rank, world_size)),
            self.accelerator.device,
            self.objective,
        )
        log(event="evaluation", step=step, **asdict(evaluation))
        return evaluation


def count_examples(settings: TrainSettings, in_epoch: int, per_step: int) -> int:
    """How many samples a run takes, repetitions counted."""
    examples = max(1, round(settings.epochs * in_epoch))
    if settings.max_steps is None:
        return examples
    return min(examples, settings.max_steps * per_step)


def _examples_per_step(settings: TrainSettings, accelerator: Accelerator) -> int:
    return settings.batch_size * settings.gradient_accumulation * accelerator.num_processes


def _record(
    settings: TrainSettings,
    manifest: Manifest,
    identity: Identity,
    accelerator: Accelerator,
    result: TrainResult,
) -> dict[str, Any]:
    """What `qpipe.json` says: what was asked, what made the model, and how it went."""
    targets = {"identity": asdict(manifest.identity), "parents": manifest.parents}
    return {
        "identity": asdict(identity),
        "fingerprint": identity.fingerprint,
        "settings": asdict(settings) | {"targets": str(settings.targets), "out": str(settings.out)},
        "parents": {"targets": targets | {"fingerprint": manifest.fingerprint}},
        "provenance": {
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "versions": package_versions("qpipe", "torch", "transformers", "accelerate"),
        },
        "results": asdict(result),
    }


def _result_from(results: dict[str, Any]) -> TrainResult:
    """The results of an earlier run."""
    evaluations = {
        name: None if results[name] is None else Evaluation(**results[name])
        for name in ("before", "after")
    }
    return TrainResult(**{**results, **evaluations, "was_done": True})
