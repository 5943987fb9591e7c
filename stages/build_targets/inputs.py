"""The score folders that targets are built from: the base's, and a teacher's joined to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.methods.definition import Choice
from ...pipeline.methods.rules import TOP_ENTROPY_SIZE
from ...pipeline.progress import progress_bar
from ...pipeline.targets.build import Evidence, ScoreModel
from .score_folder import pieces, score_model
from .teacher import Teacher


@dataclass(frozen=True)
class Inputs:
    """What build-targets reads."""

    scores: SealedFolder
    base_model: ScoreModel
    teacher: Teacher | None = None
    teacher_model: ScoreModel | None = None

    @property
    def shard_count(self) -> int:
        """Target shards match the base's score shards."""
        return len(self.scores.shards)

    def evidence(self, index: int) -> Iterator[list[Evidence]]:
        """What is known at the positions of a shard, for each of its batches piece by piece."""
        if self.teacher is None:
            for batch in self.scores.batches(index):
                yield [Evidence(piece, self.base_model) for piece in pieces(self.scores, batch)]
            return
        for batch, own in self.teacher.batches(index):
            ours, theirs = pieces(self.scores, batch), pieces(self.teacher.folder, own)
            yield [
                Evidence(one, self.base_model, other, self.teacher_model)
                for one, other in zip(ours, theirs, strict=True)
            ]

    def all_evidence(self, description: str) -> Iterator[Evidence]:
        """What is known at all positions, in order, under a progress bar."""
        total = self.scores.manifest.totals["positions"]
        with progress_bar(total=total, desc=description, unit="tok", unit_scale=True) as progress:
            for index in range(self.shard_count):
                for evidence in chain.from_iterable(self.evidence(index)):
                    yield evidence
                    progress.update(len(evidence.observed_ids))

    def lacking(self, choice: Choice) -> tuple[str, str] | None:
        """What a method needs that is not here, and the way to it; None where nothing lacks."""
        folder, settings = self.scores.path, self.scores.settings
        if choice.needs_teacher and self.teacher is None:
            return "a teacher", (
                "score the demonstrations under another model of the same tokenizer with `qpipe "
                f"score --model … --at {folder} --out teacher`, then give --teacher teacher"
            )
        if choice.needs_mask and not self.scores.manifest.totals["sums"].get("weighted"):
            return f"token weights, and the demonstrations of {folder} carry none", (
                "give their answers `spans`, `token_weights` or `weight`, and score again"
            )
        needed = min(TOP_ENTROPY_SIZE, settings["vocab_size"])
        reads_top = "top_entropy" in choice.method.reads and not choice.reads_student
        if reads_top and settings["top_k"] < needed:
            return f"the {needed} most probable tokens, {folder} holds {settings['top_k']}", (
                f"score again with --top-k {needed} or more"
            )
        return None

    def check(self, choice: Choice) -> None:
        """Raises UserError for a method that needs what is not here."""
        lacking = self.lacking(choice)
        if lacking is not None:
            what, way_out = lacking
            raise UserError(f"{choice.method.name} needs {what}: {way_out}")


def open_inputs(
    scores: Path, teacher: Path | None, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Inputs:
    """Open the folders. Raises UserError where they do not fit together."""
    base = open_sealed(scores, "score")
    base_model = score_model(base, temperature)
    if base.manifest.totals["positions"] == 0:
        raise UserError(f"{scores}: has no supervised token: score other demonstrations")
    if teacher is None:
        return Inputs(base, base_model)
    other = open_sealed(teacher, "score")
    return Inputs(base, base_model, Teacher(base, other), score_model(other, teacher_temperature))
