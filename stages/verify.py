"""`qpipe verify`: whether a sealed folder holds what its manifest says, and nothing impossible."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..pipeline.errors import UserError
from ..pipeline.invariants import violations
from ..pipeline.manifest import MANIFEST, Identity, Manifest, ShardEntry, read_manifest
from ..pipeline.mixing import MIX, read_mix
from ..pipeline.progress import progress_bar
from ..pipeline.runner import REJECTS, rejects_bytes
from ..pipeline.shards import read_shard, sidecar_path
from ..pipeline.storage import json_bytes, sha256_of_file


def verify(folder: Path) -> Iterator[str]:
    """What is wrong with a sealed folder, a line each; nothing where all is well.

    Raises UserError where there is no manifest that can be read.
    """
    manifest = read_manifest(folder)
    yield from _of_manifest(folder, manifest)
    yield from _of_chain(folder / MANIFEST, asdict(manifest.identity), manifest.parents)
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
    if (folder / REJECTS).exists():
        if (folder / REJECTS).read_bytes() != rejects_bytes(manifest.shards):
            yield f"{folder / REJECTS}: is not what the manifest says was rejected"
    else:
        yield f"{folder / REJECTS}: missing"


def _of_chain(where: Path, identity: dict[str, Any], parents: dict[str, Any]) -> Iterator[str]:
    """The folders that this one was made from have the fingerprints that it was made with."""
    for name, parent in parents.items():
        try:
            own = Identity(**parent["identity"]).fingerprint
            above = parent["parents"]
        except (TypeError, KeyError) as error:
            yield f"{where}: parents, {name}: not a folder's identity ({error})"
            continue
        if identity["inputs"].get(name) != own:
            yield f"{where}: parents, {name}: its fingerprint is not the one in inputs"
        yield from _of_chain(where, parent["identity"], above)
    if identity["stage"] == "build-targets" and identity["inputs"].keys() != parents.keys():
        yield f"{where}: parents: not those that inputs names"


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
    elif path.read_bytes() != json_bytes(asdict(entry)):
        yield f"{path}: is not what the manifest says of {entry.file}"


def _of_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    path = folder / entry.file
    if not path.exists():
        yield f"{path}: missing"
        return
    if sha256_of_file(path) != entry.sha256:
        yield f"{path}: its hash is not the manifest's"
    stage, vocab_size = manifest.identity.stage, manifest.settings["vocab_size"]
    found = {"rows": 0, "tokens": 0, "positions": 0, "entries": 0}
    try:
        for batch in read_shard(folder, manifest, entry, verify=False):
            for each in violations(stage, batch, vocab_size):
                row = found["rows"] + each.row
                yield f"{path}, row {row} ({batch.ids[each.row]}): {each.column} {each.what}"
            found["rows"] += len(batch.ids)
            found["tokens"] += int(batch.lengths["token"].sum())
            found["positions"] += int(batch.lengths["position"].sum())
            found["entries"] += int(batch.lengths["entry"].sum())
    except UserError as error:
        yield str(error)
        return
    for name, number in found.items():
        if number != getattr(entry, name):
            yield f"{path}: holds {number:,} {name}, the manifest says {getattr(entry, name):,}"
