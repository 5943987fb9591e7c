"""The work folder: what the experiment makes through the commands, and the records of its runs.

Every folder is made when it is first asked for and found from then on; a record is a line that is
appended when a run has been judged. Killed at any moment, the experiment loses one run at most.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.files import write_bytes
from qpipe.pipeline.storage.json_files import read_json, write_json

from .judge import TEMPLATE, Exam, sample_unlike
from .plan import (
    CORRUPTED_SHARE,
    DEFAULT,
    KEPT,
    TEACHER,
    UNTRAINED,
    VARIANTS,
    Data,
    ExamName,
    Run,
    Size,
    Start,
)
from .processes import in_process, qpipe
from .task import Problem, demonstrations, parts

# in float32, which is everywhere the same, and on processors without bfloat16 far faster
TRAINING = ("--batch-size", 8, "--precision", "float32", "--warmup-ratio", 0.1)
SHARD_SIZE = 16  # so that a shard with the whole vocabulary fits into memory
HELP_LEARNING_RATE = 1e-4  # of the warm start and of the teacher


@dataclass(frozen=True)
class Work:
    """The folder `root`, in which the model `base` learns."""

    root: Path
    base: Path
    size: Size
    _making: dict[Path, Lock] = field(default_factory=dict)  # lanes share scores and the teacher

    def open(self) -> None:
        """Make the folder, or go on in it. Raises UserError where it holds another experiment."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "settings.json"
        if path.exists() and read_json(path) != self.settings:
            raise UserError(f"{self.root}: holds another experiment: give another --work")
        write_json(path, self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What runs must have in common to stand in one table, as JSON has it."""
        size = asdict(self.size)
        del size["conditions"]  # more or fewer of them change no run
        told = {
            "model": self.base.name,
            "size": size,
            "methods": [asdict(variant) for variant in VARIANTS],
            "kept": [asdict(kept) for kept in KEPT],
            "training": [*TRAINING, HELP_LEARNING_RATE],
        }
        return json.loads(json.dumps(told))

    @property
    def records(self) -> Path:
        """The records of its runs."""
        return self.root / "records.jsonl"

    @property
    def unlike(self) -> Path:
        """The chats on other subjects."""
        return self.root / "unlike.json"

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.root / "commands.log"

    @cached_property
    def parts(self) -> dict[str, list[Problem]]:
        """The problems by what they are for, none for two things."""
        size = self.size
        seeds = {f"seed{seed}": size.demonstrations for seed in range(size.seeds)}
        fixed = {"test": size.test, "validation": size.validation}
        return parts(0, **fixed, warm=size.warm, teacher=size.teacher, **seeds)

    def start(self, start: Start) -> Path:
        """The model that runs start from, which is their base prior too."""
        return self.base if start == "cold" else self._tuned("warm")

    @property
    def teacher(self) -> Path:
        """The teacher of every run: the base, tuned on clean demonstrations of its own."""
        return self._tuned("teacher")

    def scores(self, start: Start, data: Data, seed: int) -> Path:
        """A start's scores of a seed's demonstrations."""
        share = CORRUPTED_SHARE if data == "corrupted" else 0.0
        name = f"{start}-{data}-seed{seed}"
        rows = self._rows(name, demonstrations(self.parts[f"seed{seed}"], share))
        out = self.root / f"scores/{name}"
        return self._score(out, self.start(start), DEFAULT.top_k, "--demonstrations", rows)

    def targets(self, run: Run) -> Path:
        """A run's targets."""
        scores = self.scores(run.start, run.data, run.seed)
        teacher: tuple[object, ...] = ()
        if run.variant.has_teacher:
            out = scores.with_name(f"{scores.name}-teacher-top{run.kept.top_k}")
            teacher = ("--teacher", self._score(out, self.teacher, run.kept.top_k, "--at", scores))
        words = [word for param in run.variant.params for word in ("--param", param)]
        kept = run.kept
        return self._made(
            self.root / f"targets/{run.targets_name}",
            "manifest.json",
            *("build-targets", "--scores", scores, *teacher),
            *("--method", run.variant.method, "--form", run.variant.form, *words),
            *("--top-p", kept.top_p, "--max-support", kept.max_support),
            *("--precision", kept.precision),
        )

    def model(self, run: Run) -> Path:
        """The model that a run judges."""
        if run.variant == UNTRAINED:
            return self.start(run.start)
        if run.variant == TEACHER:
            return self.teacher
        return self._train(self._model_of(run), self.targets(run), self.start(run.start), run)

    def forget_models(self, runs: Iterable[Run]) -> None:
        """Remove the models of runs that were judged: half a gigabyte each."""
        for run in runs:
            shutil.rmtree(self._model_of(run), ignore_errors=True)

    def exam(self, name: ExamName) -> Exam:
        """The problems of an exam and what else is measured in it."""
        problems = self.parts[name]
        held_out = demonstrations(problems[: self.size.held_out])
        return Exam(problems, held_out, read_json(self.unlike) if name == "test" else ())

    def sample_unlike(self) -> None:
        """Make the chats on other subjects, which exams read."""
        if not self.unlike.exists():
            chats = in_process(self.log, sample_unlike, self.base, self.size.unlike)
            write_json(self.unlike, chats)

    def _tuned(self, name: str) -> Path:
        """The base tuned on demonstrations of its own, by way of scores and sft targets."""
        rows = self._rows(name, demonstrations(self.parts[name]))
        given = ("--demonstrations", rows)
        scores = self._score(self.root / f"scores/{name}", self.base, 1, *given)
        targets = self._made(
            self.root / f"targets/{name}",
            "manifest.json",
            *("build-targets", "--scores", scores, "--method", "sft"),
        )
        return self._train(self.root / name, targets, self.base)

    def _model_of(self, run: Run) -> Path:
        return self.root / f"models/{run.start}/{run.model_name}"

    def _score(self, out: Path, model: Path, top_k: int, *given: object) -> Path:
        """Scores of demonstrations, or with --at of a folder's examples, in the shards of those."""
        of_rows = ("--template", TEMPLATE, "--shard-size", SHARD_SIZE)
        rows = of_rows if given[0] == "--demonstrations" else ()
        fixed = ("--engine", "transformers", "--top-k", top_k)
        return self._made(out, "manifest.json", "score", "--model", model, *given, *rows, *fixed)

    def _train(self, out: Path, targets: Path, model: Path, run: Run | None = None) -> Path:
        learning_rate, seed = (
            (HELP_LEARNING_RATE, 0) if run is None else (run.learning_rate, run.seed)
        )
        return self._made(
            out,
            "qpipe.json",
            *("train", "--targets", targets, "--model", model, *TRAINING),
            *("--learning-rate", learning_rate, "--seed", seed),
        )

    def _made(self, out: Path, seal: str, *words: object) -> Path:
        """A folder that one command makes, unless it is there."""
        with self._alone(out):
            if not (out / seal).exists():
                out.parent.mkdir(parents=True, exist_ok=True)
                qpipe(self.log, *words, "--out", out)
        return out

    def _rows(self, name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = self.root / f"{name}.jsonl"
        with self._alone(path):
            if not path.exists():
                write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return path

    def _alone(self, out: Path) -> Lock:
        """Keeps the other lane from making the same."""
        return self._making.setdefault(out, Lock())
