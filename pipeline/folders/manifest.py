"""What a folder says of itself: the plan it is made by, and the manifest that seals it.

A folder under work holds `plan.json`; a sealed one holds `manifest.json` in its place and is never
changed again. Both carry the stage's identity, whose hash is the fingerprint.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line, shown
from ..format.schema import FORMAT_VERSION, STAGES, Schema, format_version_of
from ..storage.files import read_bytes
from ..storage.json_files import (
    json_bytes,
    parse_json,
    read_json,
    sha256_of_json,
    write_json,
    write_readable,
)
from .plausible import (
    check_counts,
    check_entry,
    check_frequent_ids,
    check_identity,
    check_kinds,
    check_maps,
)

MANIFEST = "manifest.json"
PLAN = "plan.json"


def shard_name(index: int) -> str:
    """The Arrow file of shard `index`."""
    return f"shard-{index:05d}.arrow"


@dataclass(frozen=True, slots=True)
class Identity:
    """What determines a folder's content: the same identity, the same content.

    `settings` holds only what changes the stored content; `inputs` names each input and its
    fingerprint. Both are plain JSON values.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    schema: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the identity."""
        return sha256_of_json(asdict(self))


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A committed shard, as its sidecar and the manifest describe it.

    `sums` holds what the stage adds up over its rows (probability masses, nats, counts), so that
    means over the folder are exact whatever the sharding.
    """

    file: str
    fingerprint: str
    rows: int
    tokens: int
    positions: int
    entries: int
    bytes: int
    sha256: str
    rejects: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The seal of a folder.

    `parents` holds the identities of the folders that this one was made from, so the chain back to
    the demonstrations stays readable where those folders are not at hand. `provenance` names what
    made it and leaves the content as it is: model, revision, package versions. `totals` adds up the
    shards: read, rejected, rows, tokens, positions, entries, bytes, and the stage's own sums.
    `frequent_ids` are the first ranks of a packed folder's ids (`packing.Packing`).
    """

    identity: Identity
    fingerprint: str
    parents: dict[str, Any]
    provenance: dict[str, Any]
    totals: dict[str, Any]
    shards: list[ShardEntry]
    frequent_ids: tuple[int, ...] = ()

    @property
    def kept_mass(self) -> float:
        """The mean probability that the stored entries hold."""
        return 1 - self.totals["sums"]["tail_mass"] / self.totals["positions"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the shards for each supervised position."""
        return self.totals["bytes"] / self.totals["positions"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stage that made the folder."""
        return self.identity.settings


@dataclass(frozen=True, slots=True)
class Plan:
    """What a folder under work is to become.

    `shards` and `demonstrations` are how many there will be, where that is known before the end;
    they only tell how far the work has come.
    """

    identity: Identity
    shards: int | None = None
    demonstrations: int | None = None


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `plan.json`."""
    counts = {"shards": plan.shards, "demonstrations": plan.demonstrations}
    write_json(folder / PLAN, asdict(plan.identity) | {"counts": counts})


def read_plan(folder: Path) -> Plan:
    """Read `plan.json`."""
    path = folder / PLAN
    value = read_json(path)
    counts = value.pop("counts", {}) if isinstance(value, dict) else {}
    identity = parse_identity(path, value)
    try:
        check_counts(counts)
        return Plan(identity, **counts)
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"not a plan ({one_line(error)})") from error


def identity_schema(schema: Schema) -> dict[str, str]:
    """A schema in the form that an identity carries."""
    return {column.name: str(column.arrow_type) for column in schema.stored}


def read_manifest(folder: Path, stage: str | None = None) -> Manifest:
    """The manifest of a sealed folder; `stage` names the only stage the caller can use."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}")
    if not (folder / MANIFEST).exists():
        if (folder / PLAN).exists():
            made_by = read_plan(folder).identity.stage
            raise UserError(
                f"{folder}: not finished yet: run `qpipe {made_by}` with the same options again"
            )
        makers = f"`qpipe {stage}`" if stage else "`qpipe score` or `qpipe build-targets`"
        raise UserError(
            f"{folder}: not a qpipe folder, it has no {MANIFEST}: give one made by {makers}"
        )
    manifest = parse_manifest(folder / MANIFEST, read_bytes(folder / MANIFEST))
    if stage is not None and manifest.identity.stage != stage:
        raise UserError(
            f"{folder}: made by `qpipe {manifest.identity.stage}`, but the output of "
            f"`qpipe {stage}` is needed here"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Seal a folder: write its manifest, with a hash over all that it says.

    Raises UserError where it would be too large to be read.
    """
    value = asdict(manifest) | {"frequent_ids": " ".join(map(str, manifest.frequent_ids))}
    write_readable(folder / MANIFEST, json_bytes(value | {"seal": sha256_of_json(value)}))


def parse_manifest(path: Path, content: bytes) -> Manifest:
    """The manifest in a file's content, everything about it checked that needs no other file."""
    value = parse_json(path, content)
    try:
        said = {name: each for name, each in value.items() if name != "seal"}
        identity = Identity(**said["identity"])
        check_version(path, identity)
        shards = [ShardEntry(**entry) for entry in said["shards"]]
        ids = tuple(map(int, said["frequent_ids"].split()))
        manifest = Manifest(**{**said, "identity": identity, "shards": shards, "frequent_ids": ids})
        is_sealed = value.get("seal") == sha256_of_json(said) and json_bytes(value) == content
        check_maps(parents=manifest.parents, provenance=manifest.provenance)
        check_identity(identity)
        check_frequent_ids(ids, identity.settings["vocab_size"])
        if shards and identity.stage not in STAGES:
            raise ValueError(f"a folder of {identity.stage} has no shards")
        for index, entry in enumerate(shards):
            check_entry(entry, shard_name(index), manifest.fingerprint)
        fingerprint, totals = identity.fingerprint, totals_of(shards)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not a manifest ({one_line(error)})") from error
    if manifest.fingerprint != fingerprint:
        raise _damaged(path, "its fingerprint is not that of its settings")
    if manifest.totals != totals:
        raise _damaged(path, "its totals are not those of its shards")
    if not is_sealed:
        raise _damaged(path, "its seal is not that of its content", "damaged or changed")
    return manifest


def _damaged(path: Path, why: str, what: str = "damaged") -> UserError:
    return UserError(f"{path}: {what}, {why}: restore it, or make {path.parent} again")


def totals_of(shards: list[ShardEntry]) -> dict[str, Any]:
    """The shards added up; `read` counts the demonstrations, rejected ones included."""
    totals: dict[str, Any] = {
        name: sum(getattr(entry, name) for entry in shards)
        for name in ("rows", "tokens", "positions", "entries", "bytes")
    }
    totals["rejected"] = sum(len(entry.rejects) for entry in shards)
    totals["read"] = totals["rows"] + totals["rejected"]
    names = sorted({name for entry in shards for name in entry.sums})
    totals["sums"] = {name: sum(entry.sums.get(name, 0.0) for entry in shards) for name in names}
    return totals


def parse_identity(path: Path, value: Any) -> Identity:
    """The identity of any stage in a JSON value."""
    try:
        identity = Identity(**value)
        check_kinds(identity)
        _ = identity.fingerprint  # what cannot be hashed is the identity of nothing
    except (TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not a plan ({one_line(error)})") from error
    check_version(path, identity)
    return identity


def check_version(path: Path, identity: Identity) -> None:
    """Refuse a folder of another format version."""
    stage, found = str(identity.stage), identity.format_version
    readable = format_version_of(stage)
    if type(found) is not int or found != readable:
        raise UserError(
            f"{path}: format version {shown(found)}, this qpipe reads {readable}: make it again "
            f"with `qpipe {stage[:20]}`, or use the qpipe that made it"
        )


def first_difference(wanted: Identity, found: Identity) -> str:
    """The first field in which two identities differ, with both values, as words."""
    left, right = _leaves(asdict(wanted)), _leaves(asdict(found))
    # the order of ids follows from other settings: these say more
    weight = {"stage": -1, "settings.support_order": 1}
    for name in sorted(left.keys() | right.keys(), key=lambda name: (weight.get(name, 0), name)):
        there, now = right.get(name, "absent"), left.get(name, "absent")
        if there != now:
            return f"{name} is {there} there and {now} now"
    return "nothing differs"


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested dict as one level, names joined by dots, values as the JSON that is hashed."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value, ensure_ascii=False)}
    leaves = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        leaves |= _leaves(inner, name)
    return leaves
