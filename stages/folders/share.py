"""`qpipe share`: copies a sealed folder, checks the copy, and adds a data set card."""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import MANIFEST, Manifest
from ...pipeline.folders.mixing import MIX
from ...pipeline.folders.row_index import INDEX, RowOutline
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.folders.shard_run import (
    HUB_FILE,
    REJECTS,
    finished,
    open_folder,
    rejects_bytes,
    tidy,
)
from ...pipeline.folders.shards import (
    committed_shard,
    read_sidecar,
    refuse_incomplete,
    sidecar_bytes,
    sidecar_path,
    write_sidecar,
)
from ...pipeline.progress import progress_bar
from ...pipeline.storage.cache import kept_copies, local_copy
from ...pipeline.storage.files import atomic_file, read_bytes, sha256_of_file, write_bytes
from ...pipeline.storage.locks import locked
from ...pipeline.storage.remote import fetch, forget_listing, is_remote, nameless_file
from .card import card
from .hub import DATASETS, HubFolder

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Shared:
    """The result of `qpipe share`."""

    manifest: Manifest
    copied: int  # shards, by this run
    was_done: bool = False  # by an earlier one


def share(folder: Path, target: Path, license_id: str | None, title: str | None) -> Shared:
    """Copy a sealed folder, or its missing files, the manifest last.

    Every shard is hashed before it is copied and, unless the hub does so itself, again at the
    target. Raises UserError if the target holds anything else.
    """
    source = open_sealed(folder)
    manifest = source.manifest
    if source.stage == MIX:
        raise UserError(
            f"{folder}: a mixture refers to folders and holds no rows: share each of them, then "
            "`qpipe mix` their URLs"
        )
    beside = {
        REJECTS: rejects_bytes(manifest.shards),
        CARD: card(manifest, title or folder.name, license_id).encode(),
        **_index(source),
        MANIFEST: read_bytes(folder / MANIFEST),
    }
    if str(target).startswith(DATASETS):
        return _share_to_hub(source, target, beside)
    with locked(target):
        found = open_folder(target, manifest.identity)
        if found is not None:
            return _was_there(target, manifest, beside[MANIFEST])
        copied = 0
        total = manifest.totals["bytes"]
        with progress_bar(total=total, desc="share", unit="B", unit_scale=True) as progress:
            for index, entry in enumerate(manifest.shards):
                if committed_shard(target, index, entry.fingerprint) != entry:
                    copy_shard(source, target, index)
                    copied += 1
                progress.update(entry.bytes)
        refuse_incomplete(target, manifest.shards, "it was there: run the same command again")
        for name, content in beside.items():
            write_bytes(target / name, content)
        tidy(target)
    return Shared(manifest, copied)


def _index(source: SealedFolder) -> dict[str, bytes]:
    """The index of a folder, by its name; none in a folder of an older version."""
    if not source.manifest.index:
        return {}
    content = read_bytes(source.path / INDEX)
    if hashlib.sha256(content).hexdigest() != source.manifest.index:
        raise UserError(f"{source.path / INDEX}: damaged: restore it, or make {source.path} again")
    return {INDEX: content}


def _share_to_hub(source: SealedFolder, target: Path, beside: dict[str, bytes]) -> Shared:
    """Share to the Hugging Face hub, in one commit."""
    manifest = source.manifest
    hub = HubFolder(str(target))
    if finished(target, manifest.identity) is not None:
        return _was_there(target, manifest, beside[MANIFEST])
    others = {path.name for path in target.iterdir()} - {HUB_FILE}
    if others:
        raise UserError(f"{target}: holds something else ({min(others)}): give a folder inside it")
    sidecars = {
        sidecar_path(target, index).name: sidecar_bytes(entry, _outline(source, index))
        for index, entry in enumerate(manifest.shards)
    }
    with kept_copies(source.path) as copy:
        shards = {
            entry.file: _sound_shard(source, index, copy)
            for index, entry in enumerate(manifest.shards)
        }
        hub.put({**shards, **sidecars, **beside}, f"qpipe share {manifest.fingerprint[:12]}")
    forget_listing(target)
    return Shared(manifest, len(shards))


def _was_there(target: Path, manifest: Manifest, content: bytes) -> Shared:
    if read_bytes(target / MANIFEST) != content:
        raise UserError(f"{target}: holds the same folder, made another time: give another URL")
    return Shared(manifest, 0, was_done=True)


def _sound_shard(
    source: SealedFolder, index: int, copy: Callable[[Path, str], Path] = local_copy
) -> Path:
    """A local copy of a shard. Raises UserError if its hash is not that in the manifest."""
    path, sha256 = source.shard_path(index), source.manifest.shards[index].sha256
    local = copy(path, sha256)
    if not local.exists() or sha256_of_file(local) != sha256:
        raise UserError(f"{path}: missing or damaged: restore it, or make it again")
    return local


def copy_shard(source: SealedFolder, target: Path, index: int) -> None:
    """Copy a shard, check the copy's hash, and write its sidecar."""
    entry, local = source.manifest.shards[index], _sound_shard(source, index)
    with atomic_file(target / entry.file) as file, local.open("rb") as content:
        shutil.copyfileobj(content, file)
    if sha256_there(target / entry.file) != entry.sha256:
        raise UserError(f"{target / entry.file}: arrived damaged: run the same command again")
    write_sidecar(target, index, entry, _outline(source, index))


def _outline(source: SealedFolder, index: int) -> RowOutline | None:
    """The outline in the sidecar of a shard; None where there is none."""
    with suppress(UserError):  # a sealed folder is whole without its sidecars
        return read_sidecar(source.path, index)[1]
    return None


def sha256_there(path: Path) -> str:
    """The hash of a file, also of a remote one, but never of a copy in the cache."""
    if not is_remote(path):
        return sha256_of_file(path)
    with nameless_file() as (_, local):
        fetch(path, local)
        return sha256_of_file(local)
