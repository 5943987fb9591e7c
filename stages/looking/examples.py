"""Reading score and target folders to look at them, one or several joined by id and position.

A `Look` is one example with its measures and the distributions of every folder at hand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Manifest, read_manifest
from ...pipeline.folders.sealed import (
    folder_schema,
    read_rows,
    read_scores,
    read_targets,
    shard_ids,
)
from ...pipeline.format.arrow import segment_sums
from ...pipeline.format.batches import FlatBatch, flatten, split
from ...pipeline.format.records import Example
from ...pipeline.targets.distributions import Supports, known_supports
from . import measures
from .measures import Floats

BATCH = 64  # examples that are computed together
Place = tuple[int, int, int]  # shard, record batch, row of it


@dataclass(frozen=True)
class Folder:
    """A sealed folder of scores or targets."""

    path: Path
    manifest: Manifest

    @property
    def has_targets(self) -> bool:
        """Whether it holds targets, not scores."""
        return self.manifest.identity.stage == "build-targets"

    @property
    def role(self) -> str:
        """What its distributions are called."""
        return "target" if self.has_targets else "base"

    @property
    def size(self) -> int:
        """Its examples."""
        return self.manifest.totals["rows"]

    def records(self) -> Iterator[Any]:
        """Its examples, in order."""
        return read_targets(self.path) if self.has_targets else read_scores(self.path)

    def places(self) -> dict[str, Place]:
        """Where its examples stand, by their ids."""
        places: dict[str, Place] = {}
        for shard, entry in enumerate(self.manifest.shards):
            for number, ids in enumerate(shard_ids(self.path, self.manifest, entry)):
                for row, example_id in enumerate(ids):
                    places.setdefault(example_id, (shard, number, row))
        return places

    def at(self, place: Place) -> Any:
        """One example; reads no more than its record batch."""
        shard, number, row = place
        wanted = [(number, np.array([row]))]
        (batch,) = read_rows(self.path, self.manifest, shard, wanted)
        (record,) = split(folder_schema(self.manifest), batch)
        return record

    def supports(self, batch: FlatBatch) -> Supports:
        """The distributions of a batch."""
        return measures.target_supports(batch) if self.has_targets else known_supports(batch)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """One example: N supervised positions, measures by name and distributions by role."""

    number: int  # its place in the folder
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
        """The mean of a measure over the example's supervised tokens; 0 where it has none."""
        values = self.values[measure]
        return float(values.mean()) if len(values) else 0.0


@dataclass(slots=True)
class Skipped:
    """Examples that another folder has not, or has with other tokens."""

    missing: int = 0
    differing: int = 0


def open_sealed(path: Path) -> Folder:
    """Open a folder of scores or targets. Raises UserError for anything else."""
    manifest = read_manifest(path)
    if manifest.identity.stage not in ("score", "build-targets"):
        raise UserError(
            f"{path}: made by `qpipe {manifest.identity.stage}`: give scores or targets"
        )
    return Folder(path, manifest)


def open_scores(path: Path) -> Folder:
    """Open a folder of scores."""
    return Folder(path, read_manifest(path, "score"))


class Companion:
    """Another folder's records of the examples of a first one, found by id.

    Read side by side as long as both have the same order; else its ids are read once.
    """

    def __init__(self, main: Folder, folder: Folder) -> None:
        ours, theirs = (each.manifest.settings["tokenizer_hash"] for each in (main, folder))
        if ours != theirs:
            raise UserError(
                f"{folder.path}: made with tokenizer {theirs[:12]}…, {main.path} with "
                f"{ours[:12]}…: only folders of one tokenizer can be laid side by side"
            )
        self.folder = folder
        self.skipped = Skipped()
        self._stream: Iterator[Any] | None = folder.records()
        self._places: dict[str, Place] = {}

    def find(self, example: Example) -> Any | None:
        """The record of an example, None where it is missing or has other tokens."""
        found = self._found(example.id)
        if found is None:
            self.skipped.missing += 1
        elif not np.array_equal(found.input_ids, example.input_ids):
            self.skipped.differing += 1
            return None
        return found

    def _found(self, example_id: str) -> Any | None:
        if self._stream is not None:
            ahead = next(self._stream, None)
            if ahead is not None and ahead.id == example_id:
                return ahead
            self._stream = None
            self._places = self.folder.places()
        place = self._places.get(example_id)
        return None if place is None else self.folder.at(place)


def looks(main: Folder, companions: Mapping[str, Companion]) -> Iterator[list[Look]]:
    """The examples of a folder with all that is known of them, some at a time.

    `companions` are named by role: base, teacher, other. Examples that one of them lacks are left
    out and counted there; positions that one lacks are left out.
    """
    records = enumerate(main.records())
    while group := list(islice(records, BATCH)):
        joined = [(number, rows) for number, row in group if (rows := _joined(row, companions))]
        if joined:
            yield _looks(main, companions, joined)


def _joined(row: Example, companions: Mapping[str, Companion]) -> list[Example]:
    """A record and its companions' on the positions that all have; [] where one is missing."""
    rows: list[Example] = [row]
    for companion in companions.values():
        found = companion.find(row)
        if found is None:
            return []
        rows.append(found)
    common = rows[0].positions
    for other in rows[1:]:
        common = np.intersect1d(common, other.positions)
    return [_restricted(each, np.isin(each.positions, common)) for each in rows]


def _restricted(row: Any, kept_N: NDArray[np.bool_]) -> Any:
    """A record on some of its positions."""
    if kept_N.all():
        return row
    kept_K = np.repeat(kept_N, row.counts)
    of_entry = {"topk_ids", "topk_log_probs", "support_ids", "support_probs"}
    names = [field.name for field in fields(row) if field.name not in ("id", "input_ids")]
    changed = {name: getattr(row, name)[kept_K if name in of_entry else kept_N] for name in names}
    return replace(row, **changed)


def _looks(
    main: Folder,
    companions: Mapping[str, Companion],
    joined: Sequence[tuple[int, list[Example]]],
) -> list[Look]:
    roles = [main.role, *companions]
    folders = [main, *(each.folder for each in companions.values())]
    batches = [
        flatten(folder_schema(folder.manifest), [rows[place] for _, rows in joined])
        for place, folder in enumerate(folders)
    ]
    panels = {
        role: folder.supports(batch)
        for role, folder, batch in zip(roles, folders, batches, strict=True)
    }
    of_own = measures.of_targets if main.has_targets else measures.of_scores
    values = of_own(batches[0], panels[main.role])
    for role, batch in zip(roles[1:], batches[1:], strict=True):
        values |= _compared(main.role, role, panels, batch)
    return _cut(batches[0], [number for number, _ in joined], values, panels)


def _compared(
    own_role: str, role: str, panels: dict[str, Supports], batch: FlatBatch
) -> dict[str, Floats]:
    """What another folder adds to what is known of a batch."""
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
    """The examples of a batch, one by one."""
    lengths_N, lengths_T = batch.lengths["position"], batch.lengths["token"]
    stops_N, stops_T = np.cumsum(lengths_N), np.cumsum(lengths_T)
    cut_panels = {role: _cut_supports(each, lengths_N) for role, each in panels.items()}
    found = []
    for row, number in enumerate(numbers):
        of_N = slice(stops_N[row] - lengths_N[row], stops_N[row])
        of_T = slice(stops_T[row] - lengths_T[row], stops_T[row])
        found.append(
            Look(
                number,
                batch.ids[row],
                batch["input_ids"][of_T],
                batch["positions"][of_N],
                {name: each[of_N] for name, each in values.items()},
                {role: each[row] for role, each in cut_panels.items()},
            )
        )
    return found


def _cut_supports(supports: Supports, lengths_N: NDArray[np.int64]) -> list[Supports]:
    """The supports of each row."""
    stops_N = np.cumsum(lengths_N)
    lengths_K = segment_sums(supports.counts, lengths_N)
    stops_K = np.cumsum(lengths_K)
    return [
        Supports(
            supports.counts[stop_N - length_N : stop_N],
            supports.ids[stop_K - length_K : stop_K],
            supports.log_probs[stop_K - length_K : stop_K],
            supports.tail_mass[stop_N - length_N : stop_N],
        )
        for stop_N, length_N, stop_K, length_K in zip(
            stops_N, lengths_N, stops_K, lengths_K, strict=True
        )
    ]
