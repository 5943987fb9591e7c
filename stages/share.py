"""`qpipe share`: a sealed folder copied to another place, checked there, with a card beside it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..pipeline.cache import local_copy
from ..pipeline.errors import UserError
from ..pipeline.locks import locked
from ..pipeline.manifest import MANIFEST, Manifest, read_manifest
from ..pipeline.progress import progress_bar
from ..pipeline.runner import REJECTS, open_folder, tidy
from ..pipeline.shards import committed_shard, sidecar_path
from ..pipeline.storage import atomic_file, read_bytes, sha256_of_file
from .card import card

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Shared:
    """What a run of `qpipe share` did."""

    manifest: Manifest
    copied: int  # shards, by this run
    was_done: bool = False  # by an earlier one


def share(folder: Path, target: Path, license_id: str | None, title: str | None) -> Shared:
    """Copy a sealed folder, or what is missing of it, the manifest last.

    Every shard is hashed at both ends. Raises UserError where the target holds something else.
    """
    manifest = read_manifest(folder)
    copied = 0
    with locked(target):
        if open_folder(target, manifest.identity) is not None:
            return Shared(manifest, 0, was_done=True)
        total = manifest.totals["bytes"]
        with progress_bar(total=total, desc="share", unit="B", unit_scale=True) as progress:
            for index, entry in enumerate(manifest.shards):
                if committed_shard(target, index, entry.fingerprint) != entry:
                    _copy_shard(folder, target, manifest, index)
                    copied += 1
                progress.update(entry.bytes)
        _put(target / REJECTS, read_bytes(folder / REJECTS))
        _put(target / CARD, card(manifest, title or folder.name, license_id).encode())
        _put(target / MANIFEST, read_bytes(folder / MANIFEST))
        tidy(target)
    return Shared(manifest, copied)


def _copy_shard(folder: Path, target: Path, manifest: Manifest, index: int) -> None:
    entry = manifest.shards[index]
    source = local_copy(folder / entry.file, entry.sha256)
    if not source.exists() or sha256_of_file(source) != entry.sha256:
        raise UserError(f"{folder / entry.file}: missing or damaged: restore it, or make it again")
    with atomic_file(target / entry.file) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)
    if sha256_of_file(target / entry.file) != entry.sha256:
        raise UserError(f"{target / entry.file}: arrived damaged: run the same command again")
    _put(sidecar_path(target, index), read_bytes(sidecar_path(folder, index)))


def _put(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
