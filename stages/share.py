"""`qpipe share`: a sealed folder copied to another place, checked there, with a card beside it."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..pipeline.cache import local_copy
from ..pipeline.errors import UserError, one_line
from ..pipeline.locks import locked
from ..pipeline.manifest import MANIFEST, Manifest, read_manifest
from ..pipeline.mixing import MIX
from ..pipeline.progress import progress_bar
from ..pipeline.remote import fetch, is_remote
from ..pipeline.runner import REJECTS, open_folder, rejects_bytes, tidy
from ..pipeline.shards import committed_shard, write_sidecar
from ..pipeline.storage import atomic_file, read_bytes, sha256_of_file
from .card import card

CARD = "README.md"
HUB_DATASETS = "hf://datasets/"


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
    if manifest.identity.stage == MIX:
        raise UserError(
            f"{folder}: a mixture names folders and holds none of their rows: share each of them, "
            "then `qpipe mix` their URLs"
        )
    content = read_bytes(folder / MANIFEST)
    create_repository(str(target))
    copied = 0
    with locked(target):
        if open_folder(target, manifest.identity) is not None:
            if read_bytes(target / MANIFEST) != content:
                raise UserError(
                    f"{target}: holds the same work, made another time: give another URL"
                )
            return Shared(manifest, 0, was_done=True)
        total = manifest.totals["bytes"]
        with progress_bar(total=total, desc="share", unit="B", unit_scale=True) as progress:
            for index, entry in enumerate(manifest.shards):
                if committed_shard(target, index, entry.fingerprint) != entry:
                    _copy_shard(folder, target, manifest, index)
                    copied += 1
                progress.update(entry.bytes)
        _put(target / REJECTS, rejects_bytes(manifest.shards))
        _put(target / CARD, card(manifest, title or folder.name, license_id).encode())
        _put(target / MANIFEST, content)
        tidy(target)
    return Shared(manifest, copied)


def create_repository(url: str) -> None:
    """Make the repository of an `hf://datasets/` URL, a private one, if it is not there."""
    owner_and_name = url.removeprefix(HUB_DATASETS).split("@")[0].split("/")[:2]
    if not url.startswith(HUB_DATASETS) or len(owner_and_name) < 2:
        return
    from huggingface_hub import create_repo

    try:
        create_repo("/".join(owner_and_name), repo_type="dataset", private=True, exist_ok=True)
    except Exception as error:  # the hub and the network each have their own
        raise UserError(
            f"{url}: the repository cannot be made: {one_line(error)}: log in with "
            "`hf auth login`, or make it on the hub"
        ) from error


def _copy_shard(folder: Path, target: Path, manifest: Manifest, index: int) -> None:
    entry = manifest.shards[index]
    source = local_copy(folder / entry.file, entry.sha256)
    if not source.exists() or sha256_of_file(source) != entry.sha256:
        raise UserError(f"{folder / entry.file}: missing or damaged: restore it, or make it again")
    with atomic_file(target / entry.file) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)
    if _sha256_there(target / entry.file) != entry.sha256:
        raise UserError(f"{target / entry.file}: arrived damaged: run the same command again")
    write_sidecar(target, index, entry)


def _sha256_there(path: Path) -> str:
    """The hash of a file, wherever it is; never of a copy in the cache."""
    if not is_remote(path):
        return sha256_of_file(path)
    with tempfile.NamedTemporaryFile(prefix="qpipe-") as file:
        fetch(path, Path(file.name))
        return sha256_of_file(Path(file.name))


def _put(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
