"""Mixtures of target folders: a sealed folder that holds only a manifest.

Its settings hold the weights of the parts, its inputs their fingerprints, its provenance their
places: URLs, or paths relative to the mixture, which must then be local too.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path

import msgspec

from ..errors import UserError, shown
from ..format.schema import schema_of
from ..methods.definition import Choice
from ..methods.table import choose
from ..storage.locks import locked
from ..storage.remote import is_remote, open_path
from .manifest import MANIFEST, Identity, read_manifest
from .sealed import SealedFolder, open_sealed
from .shard_run import Job, ShardRun, StageResult, open_folder

MIX = "mix"
_STORES = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss")  # reading these runs no code
_SHARED = ("vocab_size", "tokenizer_hash", "residual", "tail_shape")


@dataclass(frozen=True, slots=True)
class Part:
    """A target folder of a mixture, and its weight."""

    folder: SealedFolder
    weight: float


def write_mix(out: Path, parts: Sequence[tuple[Path, float]]) -> StageResult:
    """Seal a mixture of target folders. Copies nothing.

    Raises UserError if the folders do not fit together, one is given twice, or a weight is not
    above 0.
    """
    opened = [Part(open_sealed(path, "build-targets"), weight) for path, weight in parts]
    _check(out, opened)
    job = _job(out, {f"part-{number}": part for number, part in enumerate(opened, start=1)})
    with locked(out):
        return open_folder(out, job.identity) or ShardRun(job).seal()


def _check(out: Path, parts: Sequence[Part]) -> None:
    if len(parts) < 2:
        raise UserError("a mixture needs two folders or more: give A=3 B=1")
    first = parts[0].folder
    seen: dict[str, Path] = {}
    for part in parts:
        path, fingerprint = part.folder.path, part.folder.manifest.fingerprint
        if is_remote(out) and not is_remote(path):
            raise UserError(
                f"{out}: {path} cannot be read on other machines: copy it to a store with `qpipe "
                "share`, and mix its URL"
            )
        if not 0 < part.weight < float("inf"):
            raise UserError(f"{path}={part.weight:g}: give a weight above 0")
        if fingerprint in seen:
            raise UserError(
                f"{path}: is the same as {seen[fingerprint]}: give it once, with a larger weight"
            )
        seen[fingerprint] = path
        refuse_to_mix(first.path, _traits(first), path, _traits(part.folder))


def refuse_to_mix(
    first: Path, ours: Mapping[str, object], other: Path, theirs: Mapping[str, object]
) -> None:
    """Raise UserError if two target folders differ in a trait that all folders of a run share.

    Frozen folders may differ in their method: the trainer treats them alike.
    """
    for name, here in ours.items():
        if theirs[name] != here:
            raise UserError(
                f"{other}: cannot be mixed with {first}: its {name.replace('_', ' ')} is "
                f"{theirs[name]} and there {here}: build targets that agree in it"
            )


def live_method(choice: Choice) -> str:
    """The method with its parameters if it reads the student's logits in training, else "none"."""
    if not choice.reads_student:
        return "none"
    return ", ".join([choice.method.name, *(f"{k}={v}" for k, v in choice.parameters.items())])


def _traits(folder: SealedFolder) -> Mapping[str, object]:
    settings = folder.settings
    choice = choose(settings["method"], settings["form"], settings["parameters"])
    return {name: settings[name] for name in _SHARED} | {"live method": live_method(choice)}


def _job(out: Path, parts: dict[str, Part]) -> Job:
    folders = {name: part.folder for name, part in parts.items()}
    first = folders["part-1"].settings
    weights = [float(part.weight) for part in parts.values()]
    identity = Identity(
        stage=MIX,
        settings={name: first[name] for name in _SHARED} | {"weights": weights},
        inputs={name: folder.manifest.fingerprint for name, folder in folders.items()},
        schema={},
    )
    return Job(
        out,
        schema_of("build-targets", first["vocab_size"]),
        identity,
        parents={name: folder.manifest.as_parent for name, folder in folders.items()},
        provenance={"parts": {name: _place(folder.path, out) for name, folder in folders.items()}},
    )


def is_mix(folder: Path) -> bool:
    """Whether a folder is a sealed mixture."""
    return (folder / MANIFEST).exists() and read_manifest(folder).identity.stage == MIX


def parts_of(folder: Path) -> list[Part]:
    """The parts of a mixture; a target folder is its own only part."""
    if is_mix(folder):
        return read_mix(folder)
    return [Part(open_sealed(folder, "build-targets"), 1.0)]


def read_mix(folder: Path) -> list[Part]:
    """The parts of a mixture.

    Raises UserError if the folder is not a sealed mixture, or a part is missing or has changed.
    """
    manifest = open_sealed(folder, MIX).manifest
    try:
        weights = msgspec.convert(manifest.settings["weights"], list[float])
        places = msgspec.convert(manifest.provenance["parts"], dict[str, str])
        names = [f"part-{number}" for number in range(1, len(weights) + 1)]
        named = [(places[name], manifest.identity.inputs[name]) for name in names]
    except (KeyError, msgspec.ValidationError) as error:
        raise UserError(f"{folder}: damaged, it does not name its parts ({error})") from error
    folders = [_part(folder, *each) for each in named]
    return [Part(*each) for each in zip(folders, weights, strict=True)]


def _part(folder: Path, place: str, fingerprint: str) -> SealedFolder:
    path = _located(folder, place)
    is_there = False
    with suppress(OSError):  # a name that the file system does not allow
        is_there = path.is_dir()
    if not is_there:
        raise UserError(
            f"{folder}: its part {str(path)[:300]} does not exist: restore it, or mix again with "
            "another --out"
        )
    part = open_sealed(path, "build-targets")
    now = part.manifest.fingerprint
    if now != fingerprint:
        raise UserError(
            f"{folder}: its part {path} has changed, its fingerprint is {now[:12]}… and not "
            f"{fingerprint[:12]}…: mix again with another --out"
        )
    return part


def _place(part: Path, out: Path) -> str:
    if not is_remote(part):
        return relpath(part.resolve(), out.resolve())
    _refuse_unknown_store(out, str(part))
    return str(part)


def _located(folder: Path, place: str) -> Path:
    if "://" in place:
        _refuse_unknown_store(folder, place)
        return open_path(place)
    if is_remote(folder):
        raise UserError(f"{folder}: its part {place} is on the machine that mixed it")
    return Path(relpath(folder.resolve() / place))


def _refuse_unknown_store(folder: Path, url: str) -> None:
    """Raise UserError for a URL outside of `_STORES`: the manifest may come from a stranger."""
    if url.partition("://")[0] not in _STORES or "::" in url:
        raise UserError(
            f"{folder}: its part {shown(url)} is not in a store that a mixture may name, "
            f"{', '.join(_STORES)}: copy the folder to one, and mix again"
        )
