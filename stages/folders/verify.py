"""`qpipe verify`: checks a sealed folder against its manifest, and its rows for validity.

A finished model is checked against the hashes in its `qpipe.json`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ...pipeline.errors import UserError, one_line, quoted
from ...pipeline.folders.manifest import (
    MANIFEST,
    Identity,
    ShardEntry,
    identity_schema,
    manifest_bytes,
)
from ...pipeline.folders.mixing import MIX, read_mix
from ...pipeline.folders.row_index import INDEX, RowOutline, join, outline_of, read_index
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.folders.shard_run import REJECTS, rejects_bytes
from ...pipeline.folders.shards import read_sidecar, sidecar_bytes, sidecar_path
from ...pipeline.format.batches import FlatBatch
from ...pipeline.format.row_checks import violations
from ...pipeline.progress import progress_bar
from ...pipeline.storage.files import is_content, sha256_of_file
from ...trainer.run.folder import RUN, model_files, read_record


def verify(folder: Path) -> Iterator[str]:
    """Yield the problems of a sealed folder, one line each.

    Raises UserError if there is no readable manifest.
    """
    sealed = open_sealed(folder)
    manifest = sealed.manifest
    yield from _of_manifest(sealed)
    yield from _of_chain(folder / MANIFEST, manifest.identity, manifest.parents)
    yield from _strays(sealed)
    if sealed.stage == MIX:
        yield from _of_parts(folder)
    total = manifest.totals["positions"]
    with progress_bar(total=total, desc="verify", unit="tok", unit_scale=True) as progress:
        outlines = []
        for shard, entry in enumerate(manifest.shards):
            read: list[FlatBatch] = []
            problems = list(_of_shard(sealed, shard, read))
            outline = None if problems else outline_of(shard, read)
            outlines.append(outline)
            yield from _of_sidecar(folder, shard, entry, outline)
            yield from problems
            progress.update(entry.positions)
    if manifest.index:
        yield from _of_index(sealed, outlines)


def verify_run(folder: Path) -> Iterator[str]:
    """Yield the problems of a finished model, one line each.

    Raises UserError if there is no readable `qpipe.json`.
    """
    identity, record = read_record(folder)
    if identity.fingerprint != record.get("fingerprint"):
        yield f"{folder / RUN}: its fingerprint does not match its settings"
    for path, (size, sha256) in model_files(folder, record).items():
        if not path.is_file():
            yield f"{path}: missing"
        elif path.stat().st_size != size:
            yield f"{path}: has {path.stat().st_size:,} bytes, {size:,} in {RUN}"
        elif sha256 not in (None, sha256_of_file(path)):
            yield f"{path}: its hash is not that in {RUN}"


def _of_parts(folder: Path) -> Iterator[str]:
    """The problems of the folders that a mixture refers to."""
    try:
        for part in read_mix(folder):
            yield from verify(part.folder.path)
    except UserError as error:
        yield str(error)


def _of_manifest(folder: SealedFolder) -> Iterator[str]:
    rejects, manifest = folder.path / REJECTS, folder.manifest
    if not rejects.exists():
        yield f"{rejects}: missing"
    elif not is_content(rejects, rejects_bytes(manifest.shards)):
        yield f"{rejects}: differs from the rejects in the manifest"
    if not is_content(folder.path / MANIFEST, manifest_bytes(manifest)):
        yield f"{folder.path / MANIFEST}: its seal does not match its content"
    if folder.stage != MIX and manifest.identity.schema != identity_schema(folder.schema):
        yield f"{folder.path / MANIFEST}: its schema does not match its settings"


def _of_chain(where: Path, identity: Identity, parents: Any) -> Iterator[str]:
    """The problems of the parents: their fingerprints must match the inputs."""
    try:
        if identity.stage == "build-targets" and identity.inputs.keys() != dict(parents).keys():
            yield f"{where}: parents: not the same names as in inputs"
        for name, parent in dict(parents).items():
            own = msgspec.convert(parent["identity"], Identity)
            if identity.inputs.get(name) != own.fingerprint:
                yield f"{where}: parents, {quoted(name)}: its fingerprint is not the one in inputs"
            yield from _of_chain(where, own, parent["parents"])
    except (TypeError, KeyError, ValueError, RecursionError, msgspec.ValidationError) as error:
        yield f"{where}: parents: not the identities of folders ({one_line(error)})"


def _strays(folder: SealedFolder) -> Iterator[str]:
    known = {folder.shard_path(shard).name for shard in folder.shards}
    known |= {sidecar_path(folder.path, shard).name for shard in folder.shards}
    for path in sorted(folder.path.glob("shard-*")):
        if path.name not in known:
            yield f"{path}: not in the manifest"


def _of_sidecar(
    folder: Path, index: int, entry: ShardEntry, outline: RowOutline | None
) -> Iterator[str]:
    """The problems of a sidecar; `outline` is that of the shard's rows, if they can be read."""
    path, stated = sidecar_path(folder, index), None
    with suppress(UserError):
        _, stated = read_sidecar(folder, index)
    if not path.exists():
        yield f"{path}: missing"
    elif not is_content(path, sidecar_bytes(entry, stated)):
        yield f"{path}: differs from the entry of {entry.file} in the manifest"
    elif stated is not None and outline is not None and not stated.is_same(outline):
        yield f"{path}: its outline differs from the rows of {entry.file}"


def _of_index(folder: SealedFolder, outlines: Sequence[RowOutline | None]) -> Iterator[str]:
    """The problems of the index; `outlines` are those of the shards' rows, if they can be read."""
    try:
        stated = join(read_index(folder.path, folder.manifest))
    except UserError as error:
        yield str(error)
        return
    known = [outline for outline in outlines if outline is not None]
    if len(known) == len(outlines) and not stated.is_same(join(known)):
        yield f"{folder.path / INDEX}: differs from the rows of the shards"


def _of_shard(folder: SealedFolder, shard: int, read: list[FlatBatch]) -> Iterator[str]:
    """The problems of a shard's bytes, then of its rows as far as they can be read.

    `read` receives the ids and the lengths of the rows.
    """
    path, entry = folder.shard_path(shard), folder.manifest.shards[shard]
    if path.is_file():
        size = path.stat().st_size
        if size != entry.bytes:
            yield f"{path}: has {size:,} bytes, {entry.bytes:,} in the manifest"
        if sha256_of_file(path) != entry.sha256:
            yield f"{path}: its hash is not the manifest's"
    first = 0
    try:
        for batch in folder.batches(shard, verify=False):
            read.append(replace(batch, arrays={}))
            for each in violations(folder.stage, batch, folder.settings["vocab_size"]):
                name = quoted(batch.ids[each.row])
                yield f"{path}, row {first + each.row} ({name}): column {each.column} {each.what}"
            first += len(batch.ids)
    except UserError as error:
        yield str(error)
