"""How a stage runs over its shards: what is there is kept, what is missing is made, then sealed.

The row plan is fixed: shard i covers the same rows whatever the machine. A relaunch makes only the
missing shards; a folder made with other settings is refused, never overwritten.
"""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from ..errors import UserError
from ..format.schema import Schema
from ..storage.files import TEMPORARY, write_bytes
from ..storage.json_files import json_bytes, read_json
from ..threads import in_order
from .manifest import (
    MANIFEST,
    PLAN,
    Identity,
    Manifest,
    Plan,
    ShardEntry,
    first_difference,
    read_manifest,
    read_plan,
    shard_name,
    totals_of,
    write_manifest,
    write_plan,
)
from .shards import ShardContent, commit_shard, committed_shard

REJECTS = "rejects.jsonl"
MOST_SHARDS = 150_000  # that of a target folder's manifest stay below `storage.MOST_BYTES`
MOST_OF_REJECTS = 2**27  # bytes, for the same reason
HUB_FILE = ".gitattributes"  # that a new repository of the Hugging Face hub holds


# a shard's index, and what makes it; that gives None behind the last shard
Task = tuple[int, Callable[[], ShardContent | None]]
Claim = Callable[[Path], AbstractContextManager[bool]]  # holds a shard; whether it is ours to make
# index, sidecar, and seconds from the start of its making
OnCommit = Callable[[int, ShardEntry, float], None]


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


def folder_in(out: Path, in_store: bool, identity: Identity) -> Path:
    """The folder that holds an identity: `out`, or its own place in a store of many folders.

    Whoever wants the same of a store comes to the same folder.
    """
    return out / f"{identity.stage}-{identity.fingerprint[:16]}" if in_store else out


@dataclass(frozen=True, slots=True)
class StageResult:
    """A sealed folder's manifest, and what this run did for it (nothing, where it was there)."""

    manifest: Manifest
    positions: int = 0  # supervised positions of the shards made
    seconds: float = 0.0  # spent on them, the start of an engine not counted
    was_done: bool = False  # by an earlier run


def open_folder(folder: Path, plan: Plan | Identity, alone: bool = True) -> Manifest | None:
    """Make ready to work in a folder; its manifest, if the work is done already.

    `alone` says that nobody else works in it. Raises UserError where the folder holds something
    else, or the same stage with other settings.
    """
    plan = Plan(plan) if isinstance(plan, Identity) else plan
    if plan.shards is not None and plan.shards > MOST_SHARDS:
        raise UserError(
            f"{folder}: would have {plan.shards:,} shards, {MOST_SHARDS:,} is the most that a "
            "manifest can hold: give a larger --shard-size"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file: --out needs a folder")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other(folder, plan.identity, manifest.identity)
        way_out = f"the manifest names it: restore it, or remove {folder} and make it again"
        refuse_incomplete(folder, manifest.shards, way_out)
        if alone:
            tidy(folder)
        return manifest
    if (folder / PLAN).exists():
        try:
            found = read_plan(folder)
        except UserError:
            if (folder / MANIFEST).exists():  # another task has sealed it just now
                return open_folder(folder, plan, alone)
            raise
        if not alone or _holds_rows(folder):  # a plan that led to nothing binds nobody else
            refuse_other(folder, plan.identity, found.identity)
        if found != plan and alone:
            if found.identity != plan.identity:
                _forget_shards(folder)
            write_plan(folder, plan)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()} - {"", HUB_FILE}
        present = {name for name in names if not fnmatch(name, TEMPORARY)}
    except OSError as error:
        raise UserError(f"{folder}: cannot be used for output: {error.strerror}") from error
    if present & {PLAN, MANIFEST}:  # another task has opened or sealed it just now
        return open_folder(folder, plan, alone)
    if present:
        raise UserError(
            f"{folder}: holds something else ({min(present)}): give an empty or a new folder"
        )
    write_plan(folder, plan)
    return None


def finished(folder: Path, identity: Identity) -> Manifest | None:
    """The manifest of a folder that is done and tidy, told without holding it.

    Any number of commands may find it so at a time, also where they may only read. Raises UserError
    as `open_folder`.
    """
    if not (folder / MANIFEST).exists():
        return None
    is_tidy = not (folder / PLAN).exists() and not any(folder.glob(TEMPORARY))
    return open_folder(folder, identity, alone=False) if is_tidy else None


class ShardRun:
    """One run of a job: the shards that are there already, and those that it makes.

    `wanted` holds the indices of the shards that the run is about, if not all.
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

    def shards(
        self,
        tasks: Iterable[Task],
        claim: Claim | None = None,
        on_commit: OnCommit | None = None,
    ) -> Iterator[ShardEntry]:
        """The shards of the tasks in their order, made first where they are missing.

        One is committed, on a thread of its own, while the next is made. It leaves out those that
        another process has claimed, and ends behind the last one.
        """
        claim = claim or (lambda _: nullcontext(True))
        made = self._made(tasks, claim, on_commit)
        return in_order(lambda commit: commit(), made, workers=1)

    def _made(
        self, tasks: Iterable[Task], claim: Claim, on_commit: OnCommit | None
    ) -> Iterator[Callable[[], ShardEntry]]:
        """What is left to do for each shard: to commit it, and to let go of it."""
        for index, make in tasks:
            if index in self.committed:
                yield partial(self.committed.__getitem__, index)
                continue
            with ExitStack() as held:
                is_ours = held.enter_context(claim(self.job.folder / shard_name(index)))
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
    ) -> ShardEntry:
        with held:
            job = self.job
            entry = commit_shard(job.folder, index, job.schema, job.identity.fingerprint, content)
            end = perf_counter()
            self.add(index, entry)
            self.seconds = end - self._began
            if on_commit is not None:
                on_commit(index, entry, end - start)
        return entry

    def add(self, index: int, entry: ShardEntry) -> None:
        """Take note of a shard that this run made and committed.

        Raises UserError where the rejects are more than a manifest can hold.
        """
        self._count_rejects([entry])
        self.committed[index] = entry
        self.made += 1
        self.positions += entry.positions

    def _count_rejects(self, entries: Iterable[ShardEntry]) -> None:
        """Refuses more than a manifest can hold, early."""
        self._rejects += sum(len(json_bytes(entry.rejects)) for entry in entries if entry.rejects)
        if self._rejects > MOST_OF_REJECTS:
            raise UserError(
                f"{self.job.folder}: too many demonstrations cannot be used, its shard-*.json say "
                f"why in {self._rejects:,} bytes; {MOST_OF_REJECTS:,} is the most that a manifest "
                "can hold: leave such rows out of the demonstrations"
            )

    def find(self, index: int, verify: bool = False) -> bool:
        """Whether a shard is there, looked up where this run does not know of it.

        `verify` compares its hash. To seal, its size is enough: it is another task's then, which
        has compared its hash, or the task that seals would read the whole folder.
        """
        if index not in self.committed:
            job = self.job
            entry = committed_shard(job.folder, index, job.identity.fingerprint, verify=verify)
            if entry is not None:
                self.committed[index] = entry
        return index in self.committed

    def find_all(self, shards: int) -> bool:
        """Whether so many shards are all there, those that this run does not know of looked up."""
        unknown = [index for index in range(shards) if index not in self.committed]
        return all(in_order(self.find, unknown))

    def seal(self, alone: bool = True) -> StageResult:
        """Write the rejects and the manifest, the last file of a folder.

        Several processes may do so at a time: they write the same. `alone` says that nobody else
        works in the folder, whose temporary files are then removed.

        Raises UserError where a shard has been removed or cut since it was made.
        """
        job = self.job
        shards = [self.committed[index] for index in range(len(self.committed))]
        refuse_incomplete(job.folder, shards, "it was there: run the same command again")
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
        try:
            write_bytes(job.folder / REJECTS, rejects_bytes(shards))
            write_manifest(job.folder, manifest)
        except UserError:
            # another task has sealed it meanwhile, and tidied our temporary file away
            if not (job.folder / MANIFEST).exists():
                raise
        if alone:
            tidy(job.folder)
        else:
            (job.folder / PLAN).unlink(missing_ok=True)
        return StageResult(manifest, self.positions, self.seconds)


def rejects_bytes(shards: Iterable[ShardEntry]) -> bytes:
    """The content of the file of rejects."""
    rejects = [msgspec.structs.asdict(each) for entry in shards for each in entry.rejects]
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rejects).encode()


def _committed_shards(job: Job, wanted: Container[int] | None) -> dict[int, ShardEntry]:
    indices = [i for i in sidecar_indices(job.folder) if wanted is None or i in wanted]
    look_up = partial(committed_shard, job.folder, fingerprint=job.identity.fingerprint)
    # hashing leaves the interpreter free, and so does waiting for a store
    entries = zip(indices, in_order(look_up, indices), strict=True)
    return {index: entry for index, entry in entries if entry is not None}


def sidecar_indices(folder: Path) -> list[int]:
    """The shards of which there are sidecars, in their order."""
    digits = [path.stem.removeprefix("shard-") for path in folder.glob("shard-*.json")]
    return sorted(int(each) for each in digits if each.isdecimal())  # others are not of our making


def refuse_incomplete(folder: Path, shards: Sequence[ShardEntry], way_out: str) -> None:
    """Raises UserError, with a way out, for a shard that is missing or of another size."""
    paths = [folder / entry.file for entry in shards]
    for path, entry, size in zip(paths, shards, in_order(_size, paths), strict=True):
        if size != entry.bytes:
            what = "missing" if size is None else "damaged"
            raise UserError(f"{path}: {what}, {way_out}")


def _size(path: Path) -> int | None:
    """The bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _holds_rows(folder: Path) -> bool:
    # looked at one by one: the first that is there has rows as a rule
    entries = (read_json(sidecar) for sidecar in folder.glob("shard-*.json"))
    return any(not isinstance(entry, dict) or entry.get("rows") != 0 for entry in entries)


def _forget_shards(folder: Path) -> None:
    """Remove the shards of a plan that led to nothing, which are of no use to another one."""
    for path in folder.glob("shard-*"):
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a sealed folder no longer needs."""
    (folder / PLAN).unlink(missing_ok=True)
    for leftover in folder.glob(TEMPORARY):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)  # or its writer has


def refuse_other(folder: Path, wanted: Identity, found: Identity) -> None:
    """Raises UserError, naming the first difference, where a folder holds another identity."""
    if wanted.fingerprint != found.fingerprint:
        raise UserError(
            f"{folder}: already holds `qpipe {found.stage}` output made otherwise: "
            f"{first_difference(wanted, found)}: give another --out, or the same options"
        )
