"""The score folders that targets are built from: the base's, and a teacher's joined to it."""

from collections.abc import Iterator, Sequence
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
from ...pipeline.format.ragged import padded
from ...pipeline.methods.definition import Choice
from ...pipeline.methods.rules import TOP_ENTROPY_SIZE
from ...pipeline.progress import progress_bar
from ...pipeline.targets.build import Evidence, ScoreModel
from ...pipeline.targets.known import top_k_of
from ...pipeline.targets.pooling import Pooling
from ...pipeline.threads import in_order
from ..looking.vocabulary import Vocabulary
from .other_tokenizer import OtherTokenizer, vocabularies
from .teacher import Teacher
from .teacher_by_column import ByColumn, TeacherByColumn

PIECE_POSITIONS = 2048  # with fewer, Python takes more of the time than numpy
SAMPLED_BATCHES, SAMPLED_POSITIONS, SAMPLED_ENTRIES = 64, 2**14, 64


@dataclass(frozen=True)
class Inputs:
    """The score folders of the base and a teacher, and the models that they are read as."""

    scores: SealedFolder
    base_model: ScoreModel
    teachers: tuple[tuple[Teacher | OtherTokenizer | TeacherByColumn, ScoreModel], ...] = ()
    pooling: Pooling | None = None  # of several teachers

    @property
    def teacher(self) -> Teacher | OtherTokenizer | TeacherByColumn | None:
        """The first teacher."""
        return self.teachers[0][0] if self.teachers else None

    @property
    def folders(self) -> dict[str, SealedFolder]:
        """The folders by name."""
        folders = [folder for teacher, _ in self.teachers for folder in teacher.folders]
        names = ("teacher", *(f"teacher-{n}" for n in range(2, len(folders) + 1)))
        return {"scores": self.scores, **dict(zip(names, folders, strict=False))}

    @property
    def other_tokenizers(self) -> dict[str, str]:
        """The tokenizer hashes of the teachers that have another tokenizer than the base."""
        hashes = {name: each.settings["tokenizer_hash"] for name, each in self.folders.items()}
        own = hashes.pop("scores")
        return {name: each for name, each in hashes.items() if each != own}

    def evidence(self, index: int) -> Iterator[list[Evidence]]:
        """The evidence at the positions of a shard: small pieces of each of its batches."""
        if not self.teachers:
            for batch in self.scores.batches(index):
                pieces = cut(self.scores.schema, batch, PIECE_POSITIONS)
                yield [Evidence(piece, self.base_model) for piece in pieces]
            return
        for pairs in zip(*(teacher.batches(index) for teacher, _ in self.teachers), strict=True):
            ours = cut(self.scores.schema, pairs[0][0], PIECE_POSITIONS)
            theirs = [
                cut(teacher.schema, own, PIECE_POSITIONS)
                for (teacher, _), (_, own) in zip(self.teachers, pairs, strict=True)
            ]
            yield [self._evidence(*pieces) for pieces in zip(ours, *theirs, strict=True)]

    def _evidence(self, own: FlatBatch, *others: FlatBatch) -> Evidence:
        models = [model for _, model in self.teachers]
        more = tuple(zip(others[1:], models[1:], strict=True))
        return Evidence(own, self.base_model, others[0], models[0], more, self.pooling)

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
        folder = self.teacher.folder if isinstance(self.teacher, Teacher) else self.scores
        entries = folder.manifest.shards
        # shards of a subset may be empty
        filled = [shard for shard in folder.shards if entries[shard].rows]
        shards = filled[:: max(1, len(filled) // SAMPLED_BATCHES)]
        each = SAMPLED_BATCHES // len(shards) or 1
        batches = sum(min(each, -(-entries[shard].rows // BATCH_ROWS)) for shard in shards)
        most = SAMPLED_POSITIONS // max(1, batches)

        def stored_ids(shard: int) -> list[NDArray[np.int32]]:
            return [
                _stored_ids(piece, top_p, max_support)
                for batch in islice(self._sampled(folder, shard), each)
                for piece in islice(cut(folder.schema, batch, most), 1)
            ]

        ids_NS = np.concatenate([*chain.from_iterable(in_order(stored_ids, shards))])
        share = len(ids_NS) / folder.manifest.totals["positions"]
        return rank_order(np.where(ids_NS < self.base_model.vocab_size, ids_NS, -1), share)

    def _sampled(self, folder: SealedFolder, shard: int) -> Iterator[FlatBatch]:
        """The batches of a shard from which ids are counted."""
        if isinstance(self.teacher, OtherTokenizer):
            return (own for _, own in self.teacher.batches(shard))
        return folder.batches(shard, verify=False)

    def lacking(self, choice: Choice) -> tuple[str, str] | None:
        """What a method needs and the folders lack, and the way to it; None if nothing."""
        folder, settings = self.scores.path, self.scores.settings
        if choice.needs_teacher and self.teacher is None:
            return "a teacher", (
                "score the demonstrations under another model of the same tokenizer with `qpipe "
                f"score --model … --at {folder} --out teacher`, then give --teacher teacher"
            )
        if choice.stored == "contrast" and self.other_tokenizers:
            return "a teacher with the base's tokenizer, to know its most probable tokens", (
                "take another method, or a teacher of that tokenizer"
            )
        sums = self.scores.manifest.totals["sums"]
        if choice.needs_mask and not sums.get("weighted") and "masked" not in sums:
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
    scores: Path,
    teachers: Sequence[Path],
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    pooling: Pooling | None = None,
    tokenizers: Sequence[str] = (),
    by_column: ByColumn | None = None,
) -> Inputs:
    """Open the folders. Raises UserError if they do not fit together."""
    base = open_sealed(scores, "score")
    base_model = _score_model(base, temperature)
    if base.manifest.totals["positions"] == 0:
        raise UserError(f"{scores}: has no supervised token: score other demonstrations")
    others = [open_sealed(teacher, "score") for teacher in teachers]
    if by_column is not None:
        if tokenizers:
            raise UserError(
                f"--tokenizer {tokenizers[0]} does not go with --teacher-column: give teachers "
                "with the base's tokenizer"
            )
        teacher = TeacherByColumn(base, others, by_column)
        model = _score_model(teacher.folder, teacher_temperature)
        return Inputs(base, base_model, ((teacher, model),))
    found = vocabularies(base, others, tokenizers)
    if found and (temperature, teacher_temperature) != (1, 1):
        raise UserError(
            f"--temperature {temperature:g} and --teacher-temperature {teacher_temperature:g} need "
            "a teacher with the base's tokenizer: leave them out"
        )
    joined = (
        (_joined(base, each, found), _score_model(each, teacher_temperature)) for each in others
    )
    return Inputs(base, base_model, tuple(joined), pooling)


def _joined(
    base: SealedFolder, folder: SealedFolder, known: dict[str, Vocabulary]
) -> Teacher | OtherTokenizer:
    ours, theirs = (each.settings["tokenizer_hash"] for each in (base, folder))
    if ours == theirs:
        return Teacher(base, folder)
    return OtherTokenizer(base, folder, known[ours], known[theirs])


def _score_model(scores: SealedFolder, temperature: float) -> ScoreModel:
    return ScoreModel(scores.settings["top_k"], scores.settings["vocab_size"], temperature)


def _stored_ids(batch: FlatBatch, top_p: float, max_support: int) -> NDArray[np.int32]:
    """The ids kept at each position, at most SAMPLED_ENTRIES, padded with −1."""
    kept = top_k_of(batch).truncated(top_p, max_support)
    ids_NS = padded(kept.counts, kept.ids, -1)[:, :SAMPLED_ENTRIES]
    lacking = SAMPLED_ENTRIES - ids_NS.shape[1]
    return np.pad(ids_NS, ((0, 0), (0, lacking)), constant_values=-1)
