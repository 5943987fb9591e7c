"""Runs a stage over its shards: opens the folder, makes the missing shards, seals the folder.

Shard i covers the same rows on every machine and in every run, so a relaunch makes only the missing
shards. A folder made with other settings is refused, never overwritten.
"""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from ..errors import UserError
from ..format.packing import Packing
from ..format.schema import Schema
from ..storage.files import TEMPORARY, write_bytes
from ..storage.json_files import json_bytes, read_json
from ..storage.locks import claimed, locks_work
from ..threads import in_order
from .manifest import (
    MANIFEST,
    PLAN,
    Identity,
    Manifest,
    Plan,
    ShardEntry,
    create_plan,
    first_difference,
    read_manifest,
    read_plan,
    seal,
    shard_name,
    totals_of,
    write_plan,
)
from .row_index import RowOutline, write_index
from .shards import (
    ShardContent,
    commit_shard,
    committed_shard,
    read_sidecar,
    refuse_incomplete,
    sidecar_path,
)

REJECTS = "rejects.jsonl"
MOST_SHARDS = 150_000  # keeps the manifest of a target folder below `storage.files.MOST_BYTES`
MOST_OF_REJECTS = 2**27  # bytes; for the same reason
HUB_FILE = ".gitattributes"  # part of every new repository of the Hugging Face hub

# the index of a shard, and a function that makes it or returns None after the last shard
Task = tuple[int, Callable[[], ShardContent | None]]
# called with the index, the sidecar, and the seconds since the shard was begun
OnCommit = Callable[[int, ShardEntry, float], None]


@dataclass(frozen=True, slots=True)
class Job:
    """The output folder of a stage, and what its manifest states.

    `frequent_ids` is used if the schema has no packing: the ids of rows that are copied packed.
    """

    folder: Path
    schema: Schema
    identity: Identity
    parents: dict[str, Any]
    provenance: dict[str, Any]
    frequent_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageResult:
    """The manifest of a sealed folder, and the work of this run."""

    manifest: Manifest
    positions: int = 0  # supervised positions of the shards made
    seconds: float = 0.0  # spent on them, without the start of an engine
    was_done: bool = False  # by an earlier run


def folder_in(out: Path, in_store: bool, identity: Identity) -> Path:
    """The folder for an identity: `out`, or a folder inside `out` named after the identity."""
    return out / f"{identity.stage}-{identity.fingerprint[:16]}" if in_store else out


def finished(folder: Path, identity: Identity) -> StageResult | None:
    """The result of a folder that is sealed and tidy, read without a lock; else None.

    Works in a read-only folder, and for several commands at once. Raises UserError as
    `open_folder` does.
    """
    if not (folder / MANIFEST).exists():
        return None
    is_tidy = not (folder / PLAN).exists() and not any(folder.glob(TEMPORARY))
    return _result_of(folder, identity) if is_tidy else None


def open_folder(folder: Path, plan: Plan | Identity, alone: bool = True) -> StageResult | None:
    """Prepare a folder for work. Returns its result if it is sealed already.

    `alone` states that no other process works in it. Raises UserError if the folder holds anything
    else, or output of the same stage with other settings.
    """
    plan = Plan(plan) if isinstance(plan, Identity) else plan
    if plan.shards is not None and plan.shards > MOST_SHARDS:
        raise UserError(
            f"{folder}: would have {plan.shards:,} shards, {MOST_SHARDS:,} is the most that a "
            "manifest can hold: give a larger --shard-size"
        )
    if (folder / MANIFEST).exists():
        result = _result_of(folder, plan.identity)
        if alone:
            tidy(folder)
        return result
    try:
        if (folder / PLAN).exists():
            _resume(folder, plan, alone)
        else:
            _begin(folder, plan, alone)
    except UserError:
        if not (folder / MANIFEST).exists():
            raise
        return open_folder(folder, plan, alone)  # another task has sealed it meanwhile
    return None


def _result_of(folder: Path, identity: Identity) -> StageResult:
    manifest = read_manifest(folder)
    refuse_other(folder, identity, manifest.identity)
    way_out = f"the manifest names it: restore it, or remove {folder} and make it again"
    refuse_incomplete(folder, manifest.shards, way_out)
    return StageResult(manifest, was_done=True)


def _resume(folder: Path, plan: Plan, alone: bool) -> None:
    """Continue with the plan of a folder, or replace it if no rows were made with it."""
    found = read_plan(folder)
    if not alone or _holds_rows(folder) or not locks_work(folder):
        refuse_other(folder, plan.identity, found.identity)
    if found != plan and alone:
        if found.identity != plan.identity:
            for path in folder.glob("shard-*"):
                path.unlink(missing_ok=True)
        write_plan(folder, plan)


def _begin(folder: Path, plan: Plan, alone: bool) -> None:
    """Make a folder if it is missing, and write its plan."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()} - {"", HUB_FILE}
    except OSError as error:
        raise UserError(f"{folder}: cannot be used for output: {error.strerror}") from error
    present = {name for name in names if not fnmatch(name, TEMPORARY)}
    if PLAN in present:  # another task has opened the folder meanwhile
        return _resume(folder, plan, alone)
    if present:
        raise UserError(
            f"{folder}: holds something else ({min(present)}): give an empty or a new folder"
        )
    if not create_plan(folder, plan):  # another command has opened the folder meanwhile
        return _resume(folder, plan, alone)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: was sealed meanwhile")


def refuse_other(folder: Path, wanted: Identity, found: Identity) -> None:
    """Raise UserError, naming the first difference, if a folder holds another identity."""
    if wanted.fingerprint != found.fingerprint:
        raise UserError(
            f"{folder}: already holds `qpipe {found.stage}` output made differently: "
            f"{first_difference(wanted, found)}: give another --out, or the same options"
        )


def _holds_rows(folder: Path) -> bool:
    # lazily: as a rule the first sidecar has rows
    entries = (read_json(sidecar) for sidecar in folder.glob("shard-*.json"))
    return any(not isinstance(entry, dict) or entry.get("rows") != 0 for entry in entries)


def tidy(folder: Path) -> None:
    """Remove the plan and the temporary files of a sealed folder."""
    (folder / PLAN).unlink(missing_ok=True)
    for leftover in folder.glob(TEMPORARY):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


class ShardRun:
    """One run of a job: the shards found at its start, and those it makes.

    `wanted` contains the indices of the shards that matter to this run; None for all.
    """

    def __init__(self, job: Job, wanted: Container[int] | None = None) -> None:
        self.job = job
        self.committed = _committed_shards(job, wanted)
        self._rejects = 0
        self._count_rejects(self.committed.values())
        self.made = 0  # shards, by this run
        self.positions = 0  # supervised positions of these
        self.seconds = 0.0  # from the start of the first to the commit of the last
        self._began = 0.0

    def make(
        self, tasks: Iterable[Task], on_commit: OnCommit | None = None, *, alone: bool = True
    ) -> None:
        """Make and commit the missing shards of the tasks, in order, up to the last shard.

        A thread commits each shard while the next one is made. Unless this process works `alone` in
        the folder, shards that another process makes at the moment are skipped.
        """
        commits = self._commits(tasks, on_commit, alone)
        for _ in in_order(lambda commit: commit(), commits, workers=1):
            pass

    def _commits(
        self, tasks: Iterable[Task], on_commit: OnCommit | None, alone: bool
    ) -> Iterator[Callable[[], None]]:
        """Make the shards; for each one, yields the function that commits and releases it."""
        for index, make in tasks:
            if index in self.committed:
                continue
            with ExitStack() as held:
                path = self.job.folder / shard_name(index)
                is_ours = held.enter_context(nullcontext(True) if alone else claimed(path))
                if not is_ours or self.find(index, verify=True):  # made since this run began
                    continue
                start = perf_counter()
                self._began = self._began or start
                content = make()
                if content is None:
                    return
                yield partial(self._commit, index, content, start, held.pop_all(), on_commit)

    def _commit(
        self,
        index: int,
        content: ShardContent,
        start: float,
        held: ExitStack,
        on_commit: OnCommit | None,
    ) -> None:
        with held:
            job = self.job
            entry = commit_shard(job.folder, index, job.schema, job.identity.fingerprint, content)
            end = perf_counter()
            self.add(index, entry)
            self.seconds = end - self._began
            if on_commit is not None:
                on_commit(index, entry, end - start)

    def add(self, index: int, entry: ShardEntry) -> None:
        """Count a shard that was made and committed for this run.

        Raises UserError if the rejects exceed what a manifest can hold.
        """
        self._count_rejects([entry])
        self.committed[index] = entry
        self.made += 1
        self.positions += entry.positions

    def _count_rejects(self, entries: Iterable[ShardEntry]) -> None:
        self._rejects += sum(len(json_bytes(entry.rejects)) for entry in entries if entry.rejects)
        if self._rejects > MOST_OF_REJECTS:
            raise UserError(
                f"{self.job.folder}: too many demonstrations cannot be used, their reasons in "
                f"shard-*.json take {self._rejects:,} bytes; {MOST_OF_REJECTS:,} is the most that "
                "a manifest can hold: leave such rows out of the demonstrations"
            )

    def find(self, index: int, verify: bool = False) -> bool:
        """Whether a shard is there; looks on disk if this run has not seen it.

        `verify` compares its hash. To seal, the size is enough: the task that made the shard has
        compared the hash, and the sealing task would read the whole folder.
        """
        if index not in self.committed:
            job = self.job
            entry = committed_shard(job.folder, index, job.identity.fingerprint, verify=verify)
            if entry is not None:
                self.committed[index] = entry
        return index in self.committed

    def find_all(self, shards: int) -> bool:
        """Whether the first `shards` shards are all there."""
        unknown = [index for index in range(shards) if index not in self.committed]
        return all(in_order(self.find, unknown))

    def seal(self, alone: bool = True) -> StageResult:
        """Write the rejects, then the manifest, the last file of a folder.

        Several processes may seal at once: the first one's manifest stays. `alone` states that no
        other process works in the folder; its temporary files are then removed. Raises UserError if
        a shard was removed or cut since it was made, or another command sealed other shards.
        """
        job = self.job
        shards = [self.committed[index] for index in range(len(self.committed))]
        refuse_incomplete(job.folder, shards, "it was there: run the same command again")
        packing = job.schema.packing
        index = self._write_index(shards)
        manifest = Manifest(
            identity=job.identity,
            fingerprint=job.identity.fingerprint,
            parents=job.parents,
            provenance=job.provenance,
            totals=totals_of(shards),
            shards=shards,
            frequent_ids=packing.frequent_ids if isinstance(packing, Packing) else job.frequent_ids,
            index=index,
        )
        try:
            write_bytes(job.folder / REJECTS, rejects_bytes(shards))
        except UserError:
            # another task may have sealed the folder and removed this task's temporary file
            if not (job.folder / MANIFEST).exists():
                raise
        manifest = seal(job.folder, manifest)
        if alone:
            tidy(job.folder)
        else:
            (job.folder / PLAN).unlink(missing_ok=True)
        return StageResult(manifest, self.positions, self.seconds)

    def _write_index(self, shards: Sequence[ShardEntry]) -> str:
        """Write the index of the folder from the sidecars, read again to keep memory small.

        Returns its hash; "" without shards, or if an older version has made one of them.
        """
        folder = self.job.folder

        def outline(index: int) -> RowOutline | None:
            entry, outline = read_sidecar(folder, index)
            if entry != shards[index]:
                raise UserError(
                    f"{sidecar_path(folder, index)}: has changed: run the same command again"
                )
            return outline

        outlines = in_order(outline, range(len(shards)))
        try:
            return write_index(folder, _all_known(outlines)) if shards else ""
        except _OlderShardError:
            return ""


class _OlderShardError(Exception):
    """A shard of an older version, whose sidecar has no outline."""


def _all_known(outlines: Iterable[RowOutline | None]) -> Iterator[RowOutline]:
    for outline in outlines:
        if outline is None:
            raise _OlderShardError
        yield outline


def rejects_bytes(shards: Iterable[ShardEntry]) -> bytes:
    """The content of `rejects.jsonl`."""
    rejects = [msgspec.structs.asdict(each) for entry in shards for each in entry.rejects]
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rejects).encode()


def _committed_shards(job: Job, wanted: Container[int] | None) -> dict[int, ShardEntry]:
    indices = [i for i in sidecar_indices(job.folder) if wanted is None or i in wanted]
    look_up = partial(committed_shard, job.folder, fingerprint=job.identity.fingerprint)
    # on threads: hashing and waiting for a store release the interpreter
    entries = zip(indices, in_order(look_up, indices), strict=True)
    return {index: entry for index, entry in entries if entry is not None}


def sidecar_indices(folder: Path) -> list[int]:
    """The indices of the shards that have a sidecar, ascending."""
    digits = [path.stem.removeprefix("shard-") for path in folder.glob("shard-*.json")]
    return sorted(int(each) for each in digits if each.isdecimal())
