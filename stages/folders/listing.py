"""`qpipe list`: lists the folders under a root."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import MANIFEST, PLAN, Manifest, read_manifest, read_plan
from .lineage import described


@dataclass(frozen=True, slots=True)
class Listed:
    """One folder of a catalogue; numbers are None if it is not finished.

    If the folder cannot be read, `error` is the reason, and the rest is empty.
    """

    folder: str
    stage: str
    is_sealed: bool
    fingerprint: str
    model: str | None
    made: str  # method and parameters, or the selection of a subset
    rows: int | None
    positions: int | None
    bytes_per_token: float | None
    parents: list[str]  # fingerprints
    age: float | None  # seconds since it was sealed or planned
    error: str | None = None


def catalogue(root: Path) -> Iterator[Listed]:
    """The folders made by this package directly under a root, by name."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    for folder in sorted(root.iterdir(), key=lambda each: each.name):
        try:
            if (folder / MANIFEST).exists():
                yield _sealed(folder, read_manifest(folder))
            elif (folder / PLAN).exists():
                yield _planned(folder)
        except (UserError, OSError) as error:
            yield _unreadable(folder, one_line(error))
        except (
            TypeError,
            KeyError,
            AttributeError,
            ValueError,
        ) as error:  # of another program
            yield _unreadable(folder, f"what it says cannot be ({error})")


def _sealed(folder: Path, manifest: Manifest) -> Listed:
    totals = manifest.totals
    return Listed(
        folder=folder.name,
        stage=manifest.identity.stage,
        is_sealed=True,
        fingerprint=manifest.fingerprint,
        model=manifest.provenance.get("model"),
        made=described(manifest.identity),
        rows=totals["rows"],
        positions=totals["positions"],
        bytes_per_token=totals["bytes"] / max(1, totals["positions"]),
        parents=list(manifest.identity.inputs.values()),
        age=_age(folder / MANIFEST),
    )


def _planned(folder: Path) -> Listed:
    identity = read_plan(folder).identity
    return Listed(
        folder=folder.name,
        stage=identity.stage,
        is_sealed=False,
        fingerprint=identity.fingerprint,
        model=None,
        made=described(identity),
        rows=None,
        positions=None,
        bytes_per_token=None,
        parents=list(identity.inputs.values()),
        age=_age(folder / PLAN),
    )


def _unreadable(folder: Path, error: str) -> Listed:
    return Listed(folder.name, "", False, "", None, "", None, None, None, [], None, error)


def _age(path: Path) -> float | None:
    changed = getattr(path.stat(), "st_mtime", None)
    return None if not changed else max(0.0, time.time() - changed)
