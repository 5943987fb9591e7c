"""`qpipe verify`: whether a sealed folder holds what its manifest says, and nothing impossible."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ...pipeline.errors import UserError, one_line, quoted
from ...pipeline.folders.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    ShardEntry,
    identity_schema,
    read_manifest,
)
from ...pipeline.folders.mixing import MIX, read_mix
from ...pipeline.folders.sealed import folder_schema, read_shard
from ...pipeline.folders.shard_run import REJECTS, rejects_bytes
from ...pipeline.folders.shards import sidecar_bytes, sidecar_path
from ...pipeline.format.row_checks import violations
from ...pipeline.progress import progress_bar
from ...pipeline.storage.files import is_content, sha256_of_file


def verify(folder: Path) -> Iterator[str]:
    """What is wrong with a sealed folder, a line each; nothing where all is well.

    Raises UserError where there is no manifest that can be read.
    """
    manifest = read_manifest(folder)
    yield from _of_manifest(folder, manifest)
    yield from _of_chain(folder / MANIFEST, manifest.identity, manifest.parents)
    yield from _strays(folder, manifest)
    if manifest.identity.stage == MIX:
        yield from _of_parts(folder)
    total = manifest.totals["positions"]
    with progress_bar(total=total, desc="verify", unit="tok", unit_scale=True) as progress:
        for index, entry in enumerate(manifest.shards):
            yield from _of_sidecar(folder, index, entry)
            yield from _of_shard(folder, manifest, entry)
            progress.update(entry.positions)


def _of_parts(folder: Path) -> Iterator[str]:
    """What is wrong with the folders that a mixture refers to."""
    try:
        for part in read_mix(folder):
            yield from verify(part.folder)
    except UserError as error:
        yield str(error)


def _of_manifest(folder: Path, manifest: Manifest) -> Iterator[str]:
    rejects = folder / REJECTS
    if not rejects.exists():
        yield f"{rejects}: missing"
    elif not is_content(rejects, rejects_bytes(manifest.shards)):
        yield f"{rejects}: is not what the manifest says was rejected"
    if manifest.identity.stage == MIX:
        return
    if manifest.identity.schema != identity_schema(folder_schema(manifest)):
        yield f"{folder / MANIFEST}: its schema is not that of its settings"


def _of_chain(where: Path, identity: Identity, parents: Any) -> Iterator[str]:
    """The folders that this one was made from have the fingerprints that it was made with."""
    try:
        if identity.stage == "build-targets" and identity.inputs.keys() != dict(parents).keys():
            yield f"{where}: parents: not those that inputs names"
        for name, parent in dict(parents).items():
            own = msgspec.convert(parent["identity"], Identity)
            if identity.inputs.get(name) != own.fingerprint:
                yield f"{where}: parents, {quoted(name)}: its fingerprint is not the one in inputs"
            yield from _of_chain(where, own, parent["parents"])
    except (TypeError, KeyError, ValueError, RecursionError, msgspec.ValidationError) as error:
        yield f"{where}: parents: not the identities of folders ({one_line(error)})"


def _strays(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {entry.file for entry in manifest.shards}
    known |= {sidecar_path(folder, index).name for index in range(len(manifest.shards))}
    for path in sorted(folder.glob("shard-*")):
        if path.name not in known:
            yield f"{path}: the manifest does not name it"


def _of_sidecar(folder: Path, index: int, entry: ShardEntry) -> Iterator[str]:
    path = sidecar_path(folder, index)
    if not path.exists():
        yield f"{path}: missing"
    elif not is_content(path, sidecar_bytes(entry)):
        yield f"{path}: is not what the manifest says of {entry.file}"


def _of_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """What is wrong with a shard's bytes, then with its rows as far as they can be read."""
    path = folder / entry.file
    if path.is_file():
        size = path.stat().st_size
        if size != entry.bytes:
            yield f"{path}: has {size:,} bytes, the manifest says {entry.bytes:,}"
        if sha256_of_file(path) != entry.sha256:
            yield f"{path}: its hash is not the manifest's"
    stage, vocab_size = manifest.identity.stage, manifest.settings["vocab_size"]
    first = 0
    try:
        for batch in read_shard(folder, manifest, entry, verify=False):
            for each in violations(stage, batch, vocab_size):
                name = quoted(batch.ids[each.row])
                yield f"{path}, row {first + each.row} ({name}): column {each.column} {each.what}"
            first += len(batch.ids)
    except UserError as error:
        yield str(error)
