"""What a step costs beside plain SFT in transformers' Trainer and beside on-line distillation.

    python tests/benchmarks/train_step.py MODEL TARGETS [ROUNDS [EXAMPLES [FAMILY ...]]]

The same model in float32, the same demonstrations, the same optimizer (torch's fused AdamW, which
is Trainer's default); the contenders, each in a process of its own, take turns, a few steps each,
and the medians of their steps are compared. Trainer, TRL's SFTTrainer and the distillation pad;
qpipe packs, as it does by default, or pads where that is said. TARGETS is a folder with a base
residual, such as `make demo` leaves in demo/targets. EXAMPLES is the size of a step; FAMILY picks
contenders, for example Trainer "qpipe, packed".
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.methods import choose
from qpipe.stages.commands.tables import print_table
from qpipe.tests.benchmarks.figures import faster, publish
from qpipe.trainer.data.batch import Batch, packed_batch, padded_batch
from qpipe.trainer.data.stream import open_streams
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.files import find_model, load_model
from qpipe.trainer.models.student import Student
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.step import Stepper
from torch.nn.functional import kl_div
from torch.nn.utils.rnn import pad_sequence

STEPS = 3  # a turn
TRAINER = "transformers.Trainer, plain SFT"
ONLINE = "on-line distillation, dense KL"
TRL = "TRL's SFTTrainer, plain SFT"
PADDED = "qpipe sft+kl, padded"
Steps = Callable[[], list[float]]  # takes a turn; the seconds of each step
_READY: dict[str, Steps] = {}  # the contenders that this process has loaded


def main(model: str, targets: Path, rounds: int, size: int, families: list[str]) -> None:
    """Time the steps of some families, or of all."""
    padded, packed = both_forms(targets, size)
    lengths = [int(batch.attention_mask.sum()) for batch in padded]
    print(
        f"a step: {size} demonstrations, {per_step(lengths)} tokens, "
        f"{per_step(batch.input_ids.numel() for batch in padded)} padded, "
        f"{per_step(batch.input_ids.numel() for batch in packed)} packed, "
        f"{per_step(batch.tokens for batch in padded)} supervised"
    )
    with ExitStack() as stack:
        ways = contenders(stack, families or list(FAMILIES), model, targets, size)
        seconds = time_steps(ways, rounds)
    show_steps(seconds, per_step(lengths))


def both_forms(targets: Path, size: int) -> tuple[list[Batch], list[Batch]]:
    """The same steps' demonstrations, padded and packed."""
    stream, _ = open_streams(open_sealed(targets, "build-targets"), eval_fraction=0)
    examples = list(islice(stream.in_order(), size * STEPS))
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [padded_batch(part) for part in parts], [packed_batch(part) for part in parts]


def per_step(counts: Iterable[int]) -> int:
    """The mean over the steps."""
    return round(sum(counts) / STEPS)


def contenders(
    stack: ExitStack, families: list[str], model: str, targets: Path, size: int
) -> dict[str, Steps]:
    """Those that take turns, by name.

    Each family has a process of its own, as what one does with its memory would help the others.
    """
    found: dict[str, Steps] = {}
    for family in families:
        worker = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        names = worker.submit(make_ready, family, model, targets, size).result()
        found |= {name: partial(_in_turn, worker, name) for name in names}
    return found


def make_ready(family: str, model: str, targets: Path, size: int) -> list[str]:
    """Load the contenders of a family into this process; their names."""
    padded, packed = both_forms(targets, size)
    _READY.update(FAMILIES[family](find_model(model), padded, packed))
    return list(_READY)


def take_turn(name: str) -> list[float]:
    """A contender's steps, in the process that has it."""
    return _READY[name]()


def _in_turn(worker: ProcessPoolExecutor, name: str) -> list[float]:
    return worker.submit(take_turn, name).result()


def time_steps(ways: dict[str, Steps], rounds: int) -> dict[str, list[float]]:
    """The seconds of each one's steps."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, steps in ways.items():
            times = steps()
            seconds[name] += times if turn else []  # the first turn warms up
    return seconds


def show_steps(seconds: dict[str, list[float]], tokens: int) -> None:
    """Print the steps' medians, and publish ours beside those of others."""
    rivals = [name for name in (TRAINER, ONLINE, TRL) if name in seconds]
    rows = [
        (
            name,
            f"{median(times):.3f} s",
            f"{min(times):.3f} to {max(times):.3f}",
            *(f"{median(times) / median(seconds[rival]):.2f}" for rival in rivals),
        )
        for name, times in seconds.items()
    ]
    print_table([("step", "median", "spread", *(f"of {rival}" for rival in rivals)), *rows])
    publish(
        [
            faster(f"a step: {ours}", seconds[own], rival, seconds[rival], tokens, "tokens")
            for ours in ("sft", "sft+kl", "target-sft, live")
            if (own := f"qpipe {ours}") in seconds
            for rival in rivals
        ]
    )


def our_steps(base: Any, batches: list[Batch], word: str) -> dict[str, Steps]:
    """Steps of this trainer, by name, of one student.

    The stored base stands for a teacher where the method wants one.
    """
    settings = TrainSettings(targets=Path("."), model="", out=Path("."))
    student = Student(load_model(base, torch.float32)).train()
    if batches[0].segments:
        assert can_pack(student.model)
    objectives = {
        "qpipe sft": Objective(choose("sft"), "student", "base"),
        "qpipe sft+kl": Objective(choose("sft+kl"), "student", "base"),
        "qpipe target-sft, live": Objective(choose("target-sft", "live"), "student", "base"),
    }
    stepper = Stepper(start_accelerator("float32"), student, settings, objectives["qpipe sft"])

    def steps(objective: Objective) -> list[float]:
        stepper.objective = objective
        return timed(lambda batch: stepper.step(1, [batch], 1e-6), batches)

    return {name + word: partial(steps, objective) for name, objective in objectives.items()}


def timed(step: Callable[[Batch], Any], batches: list[Batch]) -> list[float]:
    """The seconds that each step takes."""
    times = []
    for batch in batches:
        start = now()
        step(batch)
        times.append(now() - start)
    return times


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def distillation_steps(base: Any, batches: list[Batch]) -> Steps:
    """Steps of plain distillation from a frozen copy that runs in the loop.

    As trainers do it that take whole batches of logits: the divergence at all positions, of which
    the supervised ones count.
    """
    student, teacher = (load_model(base, torch.float32) for _ in range(2))
    student.train()
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        with torch.no_grad():
            wanted = teacher(**batch.inputs).logits.log_softmax(-1)
        log_probs = student(**batch.inputs).logits.log_softmax(-1)
        losses = kl_div(log_probs, wanted, reduction="none", log_target=True).sum(-1)
        losses[batch.rows, batch.columns].mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: timed(step, batches)


def trainer_steps(base: Any, batches: list[Batch], name: str) -> Steps:
    """Steps of transformers' Trainer, or of TRL's SFTTrainer, on the same rows with labels."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(now() - self.start)

    rows = labelled_rows(batches)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1 + STEPS,
        "per_device_train_batch_size": len(batches[0].ids),
        "learning_rate": 1e-6,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }
    given: dict[str, Any] = {
        "model": load_model(base, torch.float32),
        "processing_class": base.tokenizer,
        "train_dataset": rows,
        "data_collator": padded_rows,
    }

    def steps() -> list[float]:
        clock = Clock()
        if name == "trl":
            plain: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
            plain["dataset_kwargs"] = {"skip_prepare_dataset": True}
            trainer: Any = SFTTrainer(**given, args=SFTConfig(**common, **plain), callbacks=[clock])
        else:
            trainer = Trainer(**given, args=TrainingArguments(**common), callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        trainer.train()
        return clock.times[1:]  # the first makes the moments, as a new Trainer must

    return steps


def labelled_rows(batches: list[Batch]) -> Any:
    """A data set of the examples, with labels at the supervised positions."""
    from datasets import Dataset

    rows = []
    for batch in batches:
        labels = torch.full_like(batch.input_ids, -100)
        places = (batch.rows, batch.columns + 1)
        labels[places] = batch.input_ids[places]
        lengths = batch.attention_mask.sum(1).tolist()
        for ids, label, length in zip(batch.input_ids, labels, lengths, strict=True):
            rows.append({"input_ids": ids[:length].tolist(), "labels": label[:length].tolist()})
    return Dataset.from_list(rows)


def padded_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of them, padded on the right."""
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    masked = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in masked], True, fill)
        for name, fill in fills.items()
    }


FAMILIES: dict[str, Callable[..., dict[str, Steps]]] = {
    "Trainer": lambda base, padded, _: {TRAINER: trainer_steps(base, padded, "transformers")},
    "on-line": lambda base, padded, _: {ONLINE: distillation_steps(base, padded)},
    "TRL": lambda base, padded, _: {TRL: trainer_steps(base, padded, "trl")},
    "qpipe, packed": lambda base, _, packed: our_steps(base, packed, ""),
    "qpipe, padded": lambda base, padded, _: {PADDED: our_steps(base, padded, ", padded")[PADDED]},
}


if __name__ == "__main__":
    words = dict(enumerate(sys.argv))
    main(words[1], Path(words[2]), int(words.get(3, 3)), int(words.get(4, 8)), sys.argv[5:])
