"""`qpipe list`: lists the folders under a root."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import MANIFEST, PLAN, Identity, read_manifest, read_plan
from .lineage import described


@dataclass(frozen=True, slots=True)
class Listed:
    """One folder of a catalogue; numbers are None if it is not finished.

    If the folder cannot be read, `error` is the reason, and the rest is empty.
    """

    folder: str
    stage: str = ""
    is_sealed: bool = False
    fingerprint: str = ""
    model: str | None = None
    made: str = ""  # method and parameters, or the selection of a subset
    rows: int | None = None
    positions: int | None = None
    bytes_per_token: float | None = None
    parents: list[str] = field(default_factory=list)  # fingerprints
    age: float | None = None  # seconds since it was sealed or planned
    error: str | None = None


def catalogue(root: Path) -> Iterator[Listed]:
    """The folders made by this package directly under a root, by name."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    for folder in sorted(root.iterdir(), key=lambda each: each.name):
        try:
            if (folder / MANIFEST).exists():
                yield _sealed(folder)
            elif (folder / PLAN).exists():
                yield _planned(folder, PLAN, read_plan(folder).identity)
        except (UserError, OSError) as error:
            yield Listed(folder.name, error=one_line(error))
        except (TypeError, KeyError, AttributeError, ValueError) as error:  # from another program
            yield Listed(folder.name, error=f"its manifest has invalid values ({error})")


def _sealed(folder: Path) -> Listed:
    manifest = read_manifest(folder)
    totals = manifest.totals
    return replace(
        _planned(folder, MANIFEST, manifest.identity),
        is_sealed=True,
        model=manifest.provenance.get("model"),
        rows=totals["rows"],
        positions=totals["positions"],
        bytes_per_token=totals["bytes"] / max(1, totals["positions"]),
    )


def _planned(folder: Path, file: str, identity: Identity) -> Listed:
    """The identity and age of a folder; `file` is its plan or manifest."""
    changed = getattr((folder / file).stat(), "st_mtime", None)
    return Listed(
        folder=folder.name,
        stage=identity.stage,
        fingerprint=identity.fingerprint,
        made=described(identity),
        parents=list(identity.inputs.values()),
        age=max(0.0, time.time() - changed) if changed else None,
    )
