"""Mixtures of target folders by reference: a folder that holds a manifest alone.

Its settings hold, part by part, the weights; its inputs the parts' fingerprints; its provenance
where the parts are: URLs, and local folders relative to the mixture, which is then local too.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

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
_STORES = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss")  # whose reading runs no code
_SHARED = ("vocab_size", "tokenizer_hash", "residual", "tail_shape")


@dataclass(frozen=True, slots=True)
class Part:
    """A target folder of a mixture, and its weight among the others."""

    folder: SealedFolder
    weight: float


def write_mix(out: Path, parts: Sequence[tuple[Path, float]]) -> StageResult:
    """Seal a mixture of target folders; nothing is copied.

    Raises UserError for folders that do not fit together or are named twice, and for weights that
    are not above 0.
    """
    for folder, _ in parts:
        if is_remote(out) and not is_remote(folder):
            raise UserError(
                f"{out}: whoever opens it elsewhere has no {folder}: `qpipe share` that first, and "
                "mix its URL"
            )
    opened = {
        f"part-{number}": Part(_targets(folder), weight)
        for number, (folder, weight) in enumerate(parts, start=1)
    }
    _check(list(opened.values()))
    job = _job(out, opened)
    with locked(out):
        return open_folder(out, job.identity) or ShardRun(job).seal()


def _job(out: Path, parts: dict[str, Part]) -> Job:
    """What the folder is to be; `parts` by their names among its inputs."""
    folders = {name: part.folder for name, part in parts.items()}
    first = folders["part-1"].settings
    identity = Identity(
        stage=MIX,
        settings={name: first[name] for name in _SHARED}
        | {"weights": [float(part.weight) for part in parts.values()]},
        inputs={name: folder.manifest.fingerprint for name, folder in folders.items()},
        schema={},
    )
    return Job(
        out,
        schema_of("build-targets", first["vocab_size"]),
        identity,
        parents={name: folder.manifest.as_parent for name, folder in folders.items()},
        provenance={
            "parts": {name: _reference(folder.path, out) for name, folder in folders.items()}
        },
    )


def is_mix(folder: Path) -> bool:
    """Whether a folder is a sealed mixture."""
    return (folder / MANIFEST).exists() and read_manifest(folder).identity.stage == MIX


def parts_of(folder: Path) -> list[Part]:
    """The parts of a mixture, or a target folder itself as the only one."""
    return read_mix(folder) if is_mix(folder) else [Part(_targets(folder), 1.0)]


def read_mix(folder: Path) -> list[Part]:
    """The parts of a mixture.

    Raises UserError where the folder is no sealed mixture, or a part is gone or another one now.
    """
    return [_part(folder, *named) for named in _named(open_sealed(folder, MIX))]


def _named(mixture: SealedFolder) -> list[tuple[float, str, str]]:
    """What a mixture says of its parts: their weights, references and fingerprints."""
    manifest = mixture.manifest
    try:
        weights = [float(weight) for weight in mixture.settings["weights"]]
        paths = [path for _, path in sorted(manifest.provenance["parts"].items(), key=_number)]
        inputs = [print_ for _, print_ in sorted(manifest.identity.inputs.items(), key=_number)]
        if not all(isinstance(path, str) for path in paths):
            raise TypeError("their places are no texts")
        return list(zip(weights, paths, inputs, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{mixture.path}: damaged, it names no parts ({error})") from error


def _part(folder: Path, weight: float, reference: str, fingerprint: str) -> Part:
    place = _located(folder, reference)
    is_there = False
    with suppress(OSError):  # a name that no file system takes
        is_there = place.is_dir()
    if not is_there:
        raise UserError(
            f"{folder}: its part {str(place)[:300]} is not there: put it back, or mix again with "
            "another --out"
        )
    part = _targets(place)
    now = part.manifest.fingerprint
    if now != fingerprint:
        raise UserError(
            f"{folder}: its part {place} is another folder now, with fingerprint {now[:12]}… "
            f"and not {fingerprint[:12]}…: mix again with another --out"
        )
    return Part(part, weight)


def _reference(part: Path, out: Path) -> str:
    if is_remote(part):
        _refuse_strange(out, str(part))
        return str(part)
    return relpath(part.resolve(), out.resolve())


def _refuse_strange(folder: Path, url: str) -> None:
    """Raises UserError for a URL of no known store: the manifest may be a stranger's."""
    if url.partition("://")[0] not in _STORES or "::" in url:
        raise UserError(
            f"{folder}: its part {shown(url)} lies in no store that a mixture may name, "
            f"{', '.join(_STORES)}: copy the folder there, and mix again"
        )


def _located(folder: Path, reference: str) -> Path:
    if "://" in reference:
        _refuse_strange(folder, reference)
        return open_path(reference)
    if is_remote(folder):
        raise UserError(f"{folder}: its part {reference} is on the machine that mixed it")
    return Path(relpath(folder.resolve() / reference))


def _number(item: tuple[str, Any]) -> int:
    return int(item[0].removeprefix("part-"))


def _targets(folder: Path) -> SealedFolder:
    return open_sealed(folder, "build-targets")


def _check(parts: Sequence[Part]) -> None:
    if len(parts) < 2:
        raise UserError("a mixture needs two folders or more: give A=3 B=1")
    first = parts[0].folder
    seen: dict[str, Path] = {}
    for part in parts:
        folder = part.folder
        if not 0 < part.weight < float("inf"):
            raise UserError(f"{folder.path}={part.weight:g}: give a weight above 0")
        twin = seen.get(folder.manifest.fingerprint)
        if twin is not None:
            raise UserError(f"{folder.path}: is the same as {twin}: give it once, with more weight")
        seen[folder.manifest.fingerprint] = folder.path
        refuse_to_mix(first.path, _traits(first), folder.path, _traits(folder))


def refuse_to_mix(
    first: Path, ours: Mapping[str, object], other: Path, theirs: Mapping[str, object]
) -> None:
    """Raises UserError where two target folders differ in a trait that one run needs the same of.

    Frozen folders may differ in method, because the trainer treats them alike.
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
