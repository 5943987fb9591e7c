"""How a stage runs over its shards: what is there is kept, what is missing is made, then sealed.

The row plan is fixed: shard i covers the same rows whatever the machine. A relaunch makes only the
missing shards; a folder made with other settings is refused, never overwritten.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from .errors import UserError
from .manifest import (
    MANIFEST,
    PLAN,
    Identity,
    Manifest,
    ShardEntry,
    first_difference,
    parse_identity,
    read_manifest,
    totals_of,
    write_manifest,
)
from .records import Reject
from .schema import Schema
from .shards import ShardContent, commit_shard, committed_shard
from .storage import TEMPORARY, atomic_file, read_json, write_json

REJECTS = "rejects.jsonl"


Task = tuple[int, Callable[[], ShardContent]]  # a shard's index, and what makes it


@dataclass(frozen=True, slots=True)
class Job:
    """One stage over one output folder.

    `frequent_ids` are those of the schema's packing, if it has one, else those by which the stage
    found its rows packed already.
    """

    folder: Path
    schema: Schema
    identity: Identity
    parents: dict[str, Any]
    provenance: dict[str, Any]
    frequent_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageResult:
    """A sealed folder's manifest, and what this run did for it (nothing, where it was there)."""

    manifest: Manifest
    positions: int = 0  # supervised positions of the shards made
    seconds: float = 0.0  # spent on them, the start of an engine not counted
    was_done: bool = False  # by an earlier run


def open_folder(folder: Path, identity: Identity) -> Manifest | None:
    """Make ready to work in a folder; its manifest, if the work is done already.

    Raises UserError where the folder holds something else, or the same stage with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file: --out needs a folder")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other(folder, identity, manifest.identity)
        _refuse_incomplete(folder, manifest)
        _tidy(folder)
        return manifest
    if (folder / PLAN).exists():
        found = parse_identity(folder / PLAN, read_json(folder / PLAN))
        if _holds_rows(folder):  # a plan that led to nothing binds nobody
            refuse_other(folder, identity, found)
        if found != identity:
            write_json(folder / PLAN, asdict(identity))
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = next((path for path in folder.iterdir() if not path.match(TEMPORARY)), None)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used for output: {error.strerror}") from error
    if present is not None:
        raise UserError(
            f"{folder}: holds something else ({present.name}): give an empty or a new folder"
        )
    write_json(folder / PLAN, asdict(identity))
    return None


class ShardRun:
    """One run of a job: the shards that are there already, and those that it makes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.committed = _committed_shards(job)
        self.positions = 0
        self.seconds = 0.0

    def shards(self, tasks: Iterable[Task]) -> Iterator[ShardEntry]:
        """Every shard of the plan in its order, made first where it is missing."""
        job = self.job
        for index, make in tasks:
            if index not in self.committed:
                start = perf_counter()
                entry = commit_shard(
                    job.folder, index, job.schema, job.identity.fingerprint, make()
                )
                self.seconds += perf_counter() - start
                self.positions += entry.positions
                self.committed[index] = entry
            yield self.committed[index]

    def seal(self) -> StageResult:
        """Write the rejects and the manifest, the last file of a folder."""
        job = self.job
        shards = [self.committed[index] for index in range(len(self.committed))]
        with atomic_file(job.folder / REJECTS) as file:
            file.write(rejects_bytes(shards))
        packing = job.schema.packing
        manifest = Manifest(
            identity=job.identity,
            fingerprint=job.identity.fingerprint,
            parents=job.parents,
            provenance=job.provenance,
            totals=totals_of(shards),
            shards=shards,
            frequent_ids=job.frequent_ids if packing is None else packing.frequent_ids,
        )
        write_manifest(job.folder, manifest)
        _tidy(job.folder)
        return StageResult(manifest, self.positions, self.seconds)


def rejects_bytes(shards: Iterable[ShardEntry]) -> bytes:
    """The content of the file of rejects."""
    rejects = (asdict(Reject(**each)) for entry in shards for each in entry.rejects)
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rejects).encode()


def _committed_shards(job: Job) -> dict[int, ShardEntry]:
    found = {}
    for sidecar in job.folder.glob("shard-*.json"):
        digits = sidecar.stem.removeprefix("shard-")
        if not digits.isdecimal():
            continue  # not of our making
        entry = committed_shard(job.folder, int(digits), job.identity.fingerprint)
        if entry is not None:
            found[int(digits)] = entry
    return found


def _refuse_incomplete(folder: Path, manifest: Manifest) -> None:
    for entry in manifest.shards:
        path = folder / entry.file
        if not path.exists() or path.stat().st_size != entry.bytes:
            what = "damaged" if path.exists() else "missing"
            raise UserError(
                f"{path}: {what}, the manifest names it: restore it, or remove {folder} and make "
                "it again"
            )


def _holds_rows(folder: Path) -> bool:
    entries = [read_json(sidecar) for sidecar in folder.glob("shard-*.json")]
    return any(not isinstance(entry, dict) or entry.get("rows") != 0 for entry in entries)


def _tidy(folder: Path) -> None:
    """Remove what a sealed folder no longer needs."""
    (folder / PLAN).unlink(missing_ok=True)
    for leftover in folder.glob(TEMPORARY):
        leftover.unlink()


def refuse_other(folder: Path, wanted: Identity, found: Identity) -> None:
    """Raises UserError, naming the first difference, where a folder holds another identity."""
    if wanted.fingerprint != found.fingerprint:
        raise UserError(
            f"{folder}: already holds `qpipe {found.stage}` output made otherwise: "
            f"{first_difference(wanted, found)}: give another --out, or the same options"
        )
