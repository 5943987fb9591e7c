"""The score folders that targets are built from: the base's, and a teacher's joined to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.folders.shards import BATCH_ROWS
from ...pipeline.format.batches import FlatBatch, cut
from ...pipeline.format.id_order import rank_order
from ...pipeline.methods.definition import Choice
from ...pipeline.methods.rules import TOP_ENTROPY_SIZE
from ...pipeline.progress import progress_bar
from ...pipeline.targets.build import Evidence, ScoreModel
from ...pipeline.targets.distributions import known_supports, padded, truncated
from .teacher import Teacher

PIECE_POSITIONS = 2048  # with fewer, Python takes more of the time than numpy
SAMPLED_BATCHES, SAMPLED_POSITIONS, SAMPLED_ENTRIES = 64, 2**14, 64


@dataclass(frozen=True)
class Inputs:
    """The score folders of the base and a teacher, and the models that they are read as."""

    scores: SealedFolder
    base_model: ScoreModel
    teacher: Teacher | None = None
    teacher_model: ScoreModel | None = None

    @property
    def folders(self) -> dict[str, SealedFolder]:
        """The folders by name."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.folder}
        return {"scores": self.scores, **teacher}

    def evidence(self, index: int) -> Iterator[list[Evidence]]:
        """The evidence at the positions of a shard: small pieces of each of its batches."""
        if self.teacher is None:
            for batch in self.scores.batches(index):
                yield [Evidence(piece, self.base_model) for piece in _pieces(self.scores, batch)]
            return
        for batch, own in self.teacher.batches(index):
            ours, theirs = _pieces(self.scores, batch), _pieces(self.teacher.folder, own)
            yield [
                Evidence(one, self.base_model, other, self.teacher_model)
                for one, other in zip(ours, theirs, strict=True)
            ]

    def all_evidence(self, description: str) -> Iterator[Evidence]:
        """The evidence at all positions, in order, under a progress bar."""
        total = self.scores.manifest.totals["positions"]
        with progress_bar(total=total, desc=description, unit="tok", unit_scale=True) as progress:
            for pieces in chain.from_iterable(map(self.evidence, self.scores.shards)):
                for evidence in pieces:
                    yield evidence
                    progress.update(len(evidence.observed_ids))

    def frequent_ids(self, top_p: float, max_support: int) -> tuple[int, ...]:
        """The most frequently stored ids, in an order that packs well.

        They are counted in a sample spread evenly over the teacher's folder, or the base's without
        one, which is the same in every run.
        """
        folder = self.scores if self.teacher is None else self.teacher.folder
        entries = folder.manifest.shards
        # shards of a subset may be empty
        filled = [shard for shard in folder.shards if entries[shard].rows]
        shards = filled[:: max(1, len(filled) // SAMPLED_BATCHES)]
        each = SAMPLED_BATCHES // len(shards) or 1
        batches = sum(min(each, -(-entries[shard].rows // BATCH_ROWS)) for shard in shards)
        most = SAMPLED_POSITIONS // max(1, batches)
        stored = [
            _stored_ids(piece, top_p, max_support)
            for shard in shards
            for batch in islice(folder.batches(shard, verify=False), each)
            for piece in cut(folder.schema, batch, most)[:1]
        ]
        ids_NS = np.concatenate(stored)
        share = len(ids_NS) / folder.manifest.totals["positions"]
        return rank_order(np.where(ids_NS < self.base_model.vocab_size, ids_NS, -1), share)

    def lacking(self, choice: Choice) -> tuple[str, str] | None:
        """What a method needs and the folders lack, and the way to it; None if nothing."""
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


def open_inputs(
    scores: Path, teacher: Path | None, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Inputs:
    """Open the folders. Raises UserError if they do not fit together."""
    base = open_sealed(scores, "score")
    base_model = _score_model(base, temperature)
    if base.manifest.totals["positions"] == 0:
        raise UserError(f"{scores}: has no supervised token: score other demonstrations")
    if teacher is None:
        return Inputs(base, base_model)
    other = open_sealed(teacher, "score")
    return Inputs(base, base_model, Teacher(base, other), _score_model(other, teacher_temperature))


def _score_model(scores: SealedFolder, temperature: float) -> ScoreModel:
    return ScoreModel(scores.settings["top_k"], scores.settings["vocab_size"], temperature)


def _pieces(folder: SealedFolder, batch: FlatBatch) -> list[FlatBatch]:
    return cut(folder.schema, batch, PIECE_POSITIONS)


def _stored_ids(batch: FlatBatch, top_p: float, max_support: int) -> NDArray[np.int32]:
    """The ids kept at each position, at most SAMPLED_ENTRIES, padded with −1."""
    kept = truncated(known_supports(batch), batch.observed_ids, top_p, max_support)
    ids_NS = padded(kept.counts, kept.ids, -1)[:, :SAMPLED_ENTRIES]
    lacking = SAMPLED_ENTRIES - ids_NS.shape[1]
    return np.pad(ids_NS, ((0, 0), (0, lacking)), constant_values=-1)
