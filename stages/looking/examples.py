"""Reads examples of score and target folders, of several folders joined by id and position.

A `Look` is one example with its measures and the distributions of all folders.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.join import Join
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.format.arrow import segment_sums
from ...pipeline.format.batches import FlatBatch, flatten, split
from ...pipeline.format.records import Example
from ...pipeline.format.schema import STAGES
from ...pipeline.targets.distributions import Supports
from ...pipeline.targets.known import known_supports
from . import measures
from .measures import Floats


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """One example: N supervised positions, measures by name and distributions by role."""

    number: int  # index in the folder
    id: str
    input_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [N]
    values: dict[str, Floats]  # [N] each
    panels: dict[str, Supports]

    @property
    def observed_ids(self) -> NDArray[np.int32]:
        """The supervised tokens, [N]."""
        return self.input_ids[self.positions]

    def mean(self, measure: str) -> float:
        """The mean of a measure over the example's supervised tokens; 0 without any."""
        values = self.values[measure]
        return float(values.mean()) if len(values) else 0.0


def open_examples(path: Path) -> SealedFolder:
    """Open a folder of scores or targets. Raises UserError for any other folder."""
    folder = open_sealed(path)
    if folder.stage not in STAGES:
        raise UserError(f"{path}: made by `qpipe {folder.stage}`: give scores or targets")
    return folder


def role_of(folder: SealedFolder) -> str:
    """The role of a folder's own distributions."""
    return "target" if folder.has_targets else "base"


class Companion:
    """Another folder with examples of a first one, joined by id.

    Raises UserError if the two folders have different tokenizers.
    """

    def __init__(self, main: SealedFolder, folder: SealedFolder) -> None:
        ours, theirs = (each.settings["tokenizer_hash"] for each in (main, folder))
        if ours != theirs:
            raise UserError(
                f"{folder.path}: made with tokenizer {theirs[:12]}…, {main.path} with "
                f"{ours[:12]}…: give folders of the same tokenizer"
            )
        self.folder = folder
        self.missing = 0  # examples that the folder lacks
        self.differing = 0  # examples that it has with other tokens
        self.records = Join(main, folder).records

    def has(self, example: Example, found: Example | None) -> bool:
        """Whether the record found for an example has the same tokens; counts it if not."""
        if found is None:
            self.missing += 1
            return False
        is_same = np.array_equal(found.input_ids, example.input_ids)
        self.differing += not is_same
        return is_same


def base_scores(main: SealedFolder, path: Path) -> Companion:
    """The base scores of a target folder. Raises UserError for any other folder."""
    if not main.has_targets:
        raise UserError(
            f"--scores {path}: requires a target folder, {main.path} holds scores: leave it out"
        )
    return Companion(main, open_sealed(path, "score"))


def looks(main: SealedFolder, companions: Mapping[str, Companion]) -> Iterator[list[Look]]:
    """The examples of a folder with all their measures, a record batch at a time.

    `companions` are named by role: base, teacher, other. Examples that a companion lacks are left
    out and counted there; positions that one lacks are left out.
    """
    numbers = count()
    for shard in main.shards:
        beside = (each.records(shard) for each in companions.values())
        for batch, *others in zip(main.batches(shard), *beside, strict=True):
            rows = zip(split(main.schema, batch), *others, strict=True)
            joined = [
                (number, kept)
                for row, number in zip(rows, numbers, strict=False)
                if (kept := _joined(row, companions))
            ]
            if joined:
                yield _looks(main, companions, joined)


def _joined(rows: Sequence[Any], companions: Mapping[str, Companion]) -> list[Example]:
    """A record and those of the companions, at the positions that all have; [] if one lacks it."""
    own, *others = rows
    for companion, other in zip(companions.values(), others, strict=True):
        if not companion.has(own, other):
            return []
    common = reduce(np.intersect1d, (row.positions for row in rows))
    return [_restricted(each, np.isin(each.positions, common)) for each in rows]


def _restricted(row: Any, kept_N: NDArray[np.bool_]) -> Any:
    """A record with some of its positions."""
    if kept_N.all():
        return row
    kept_K = np.repeat(kept_N, row.counts)
    of_entry = {"topk_ids", "topk_log_probs", "support_ids", "support_probs"}
    names = [field.name for field in fields(row) if field.name not in ("id", "input_ids")]
    changed = {name: getattr(row, name)[kept_K if name in of_entry else kept_N] for name in names}
    return replace(row, **changed)


def _looks(
    main: SealedFolder,
    companions: Mapping[str, Companion],
    joined: Sequence[tuple[int, list[Example]]],
) -> list[Look]:
    roles = [role_of(main), *companions]
    folders = [main, *(each.folder for each in companions.values())]
    batches = [
        flatten(folder.schema, [rows[place] for _, rows in joined])
        for place, folder in enumerate(folders)
    ]
    panels = {
        role: (measures.target_supports if folder.has_targets else known_supports)(batch)
        for role, folder, batch in zip(roles, folders, batches, strict=True)
    }
    of_own = measures.of_targets if main.has_targets else measures.of_scores
    values = of_own(batches[0], panels[roles[0]])
    for role, batch in zip(roles[1:], batches[1:], strict=True):
        values |= _compared(roles[0], role, panels, batch)
    return _cut(batches[0], [number for number, _ in joined], values, panels)


def _compared(
    own_role: str, role: str, panels: dict[str, Supports], batch: FlatBatch
) -> dict[str, Floats]:
    """The measures that another folder adds to a batch."""
    own, other = panels[own_role], panels[role]
    log_prob = measures.observed_log_prob(other, batch.observed_ids)
    values = {role: np.exp(log_prob)}
    if role == "base":
        own_log_prob = measures.observed_log_prob(own, batch.observed_ids)
        values |= {
            "gain": np.exp(own_log_prob) - np.exp(log_prob),
            "base-nll": -log_prob,
            "base-entropy": measures.entropy(other),
            "base-rank": batch["observed_ranks"].astype(np.float64),
            "kl": measures.divergence(own, other),
        }
    if role == "other":
        values |= {
            "kl": measures.divergence(own, other),
            "tv": measures.total_variation(own, other),
        }
    return values


def _cut(
    batch: FlatBatch, numbers: list[int], values: dict[str, Floats], panels: dict[str, Supports]
) -> list[Look]:
    """Split a batch into examples."""
    lengths_N = batch.lengths["position"]
    input_ids = parts_of(batch["input_ids"], batch.lengths["token"])
    positions = parts_of(batch["positions"], lengths_N)
    by_measure = {name: parts_of(each, lengths_N) for name, each in values.items()}
    by_role = {role: _split_supports(each, lengths_N) for role, each in panels.items()}
    return [
        Look(
            number,
            batch.ids[row],
            input_ids[row],
            positions[row],
            {name: each[row] for name, each in by_measure.items()},
            {role: each[row] for role, each in by_role.items()},
        )
        for row, number in enumerate(numbers)
    ]


def parts_of(values: NDArray[Any], lengths: NDArray[np.integer]) -> list[NDArray[Any]]:
    """Consecutive parts of these lengths."""
    return np.split(values, np.cumsum(lengths)[:-1])


def _split_supports(supports: Supports, lengths_N: NDArray[np.int64]) -> list[Supports]:
    lengths_K = segment_sums(supports.counts, lengths_N)
    parts = (
        parts_of(supports.counts, lengths_N),
        parts_of(supports.ids, lengths_K),
        parts_of(supports.log_probs, lengths_K),
        parts_of(supports.tail_mass, lengths_N),
    )
    return [Supports(*part) for part in zip(*parts, strict=True)]
