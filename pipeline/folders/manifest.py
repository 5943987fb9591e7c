"""The plan of an unfinished folder, and the manifest that seals it.

An unfinished folder holds `plan.json`; a sealed one holds `manifest.json` instead and never changes
again. Both hold the identity of the stage, whose hash is the fingerprint.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..errors import UserError, quoted, shown
from ..format.packing import PRECISIONS, SCORE_PRECISION
from ..format.records import Count, Reject
from ..format.schema import (
    FORMAT_VERSION,
    PACKED_SCORES_VERSION,
    STAGES,
    Schema,
    readable_versions,
)
from ..storage.files import create_bytes, read_bytes, write_bytes
from ..storage.json_files import (
    Number,
    json_bytes,
    parse_json,
    read_json,
    refuse_misfits,
    refuse_unreadable,
    sealed_bytes,
    sha256_of_json,
    write_readable,
)

MANIFEST = "manifest.json"
PLAN = "plan.json"


def shard_name(index: int) -> str:
    """The Arrow file of shard `index`."""
    return f"shard-{index:05d}.arrow"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings and inputs that determine a folder's content.

    `settings` holds only settings that change the stored content; `inputs` maps the name of each
    input to its fingerprint. Both are plain JSON values.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    schema: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the identity."""
        return sha256_of_json(self)


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A committed shard in its sidecar and in the manifest.

    `sums` holds the stage's own sums over the rows (probability masses, nats, counts), so that
    means over the folder do not depend on the sharding.
    """

    file: str
    fingerprint: str
    rows: Count
    tokens: Count
    positions: Count
    entries: Count
    bytes: Count
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    rejects: list[Reject] = []
    sums: dict[str, Number] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The seal of a folder.

    `parents` holds the identities of the folders that this one was made from, so that the chain
    back to the demonstrations can be read without them. `provenance` records what does not affect
    the content: model, revision, package versions. `totals` adds up the shards: read, rejected,
    rows, tokens, positions, entries, bytes, and the stage's own sums. `frequent_ids` are the ids
    of the first ranks of a packed folder (`packing.Packing`). `index` is the hash of the index
    (`row_index`), which folders of older versions lack.
    """

    identity: Identity
    fingerprint: str
    parents: dict[str, Any]
    provenance: dict[str, Any]
    totals: dict[str, Any]
    shards: list[ShardEntry]
    frequent_ids: tuple[int, ...] = ()
    index: str = ""

    @property
    def kept_mass(self) -> float:
        """The mean probability of the stored entries, summed over a position."""
        return 1 - self.totals["sums"]["tail_mass"] / self.totals["positions"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the shards per supervised position."""
        return self.totals["bytes"] / self.totals["positions"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stage that made the folder."""
        return self.identity.settings

    @property
    def as_parent(self) -> dict[str, Any]:
        """The entry of this folder in the `parents` of one that is made from it."""
        return {"identity": msgspec.to_builtins(self.identity), "parents": self.parents}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of an unfinished folder.

    `shards` and `demonstrations` are the expected numbers, if known; they only show progress.
    """

    identity: Identity
    shards: Count | None = None
    demonstrations: Count | None = None


class _Settings(msgspec.Struct):
    """The settings that readers of a sealed folder use; stages may have more."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**31)]
    tokenizer_hash: str
    top_k: Count = 0
    max_length: Count = 0
    method: str = ""
    form: str = ""
    parameters: dict[str, Number | str] = {}
    residual: str = ""
    tail_shape: Literal["student", "uniform"] = "student"
    top_p: Number | None = None
    max_support: Count | None = None
    precision: str | None = None
    temperature: Number = 1.0
    teacher_temperature: Number = 1.0


_REQUIRED: dict[str, tuple[str, ...]] = {
    "score": ("vocab_size", "tokenizer_hash", "top_k"),
    "build-targets": (
        *("vocab_size", "tokenizer_hash", "method", "form", "parameters"),
        *("residual", "tail_shape", "top_p"),
    ),
    "mix": ("vocab_size", "tokenizer_hash", "residual", "tail_shape", "weights"),
}


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `plan.json`, in the place of one that is there."""
    write_bytes(folder / PLAN, _plan_bytes(plan))


def create_plan(folder: Path, plan: Plan) -> bool:
    """Write `plan.json` unless there is one; returns whether there was none."""
    return create_bytes(folder / PLAN, _plan_bytes(plan))


def _plan_bytes(plan: Plan) -> bytes:
    counts = {"shards": plan.shards, "demonstrations": plan.demonstrations}
    return json_bytes(msgspec.structs.asdict(plan.identity) | {"counts": counts})


def read_plan(folder: Path) -> Plan:
    """Read `plan.json`."""
    path = folder / PLAN
    value = read_json(path)
    counts = value.pop("counts", {}) if isinstance(value, dict) else {}
    identity = parse_identity(path, value)
    with refuse_misfits(path, "plan", _way_out(path)):
        return msgspec.convert(msgspec.convert(counts, dict) | {"identity": identity}, Plan)


def parse_identity(path: Path, value: Any) -> Identity:
    """Convert a JSON value to an identity, of any stage."""
    _refuse_other_version(path, value)
    with refuse_misfits(path, "plan", _way_out(path)):
        identity = msgspec.convert(value, Identity)
        _ = identity.fingerprint  # raises RecursionError for settings nested too deeply
    return identity


def identity_schema(schema: Schema) -> dict[str, str]:
    """The stored columns and their types, for an identity."""
    return {column.name: str(column.arrow_type) for column in schema.stored}


def read_manifest(folder: Path, stage: str | None = None) -> Manifest:
    """Read the manifest of a sealed folder; `stage` is the only stage that the caller accepts."""
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
            f"{folder}: not a qpipe folder, it has no {MANIFEST}: give a folder made by {makers}"
        )
    manifest = parse_manifest(folder / MANIFEST, read_bytes(folder / MANIFEST))
    if stage is not None and manifest.identity.stage != stage:
        raise UserError(
            f"{folder}: made by `qpipe {manifest.identity.stage}`, but the output of "
            f"`qpipe {stage}` is needed here"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, with a hash of all its values, in the place of one that is there.

    Raises UserError if the manifest would be too large to read.
    """
    write_readable(folder / MANIFEST, manifest_bytes(manifest))


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a folder unless there is one, and return what is read back.

    Raises UserError as `write_manifest` does, and if the one that is there states other shards.
    """
    path, content = folder / MANIFEST, manifest_bytes(manifest)
    refuse_unreadable(path, content)
    create_bytes(path, content)
    found = read_manifest(folder)
    if (found.identity, found.shards) != (manifest.identity, manifest.shards):
        raise UserError(
            f"{folder}: another command sealed it meanwhile with other shards: run `qpipe verify`, "
            "or give another --out"
        )
    return found


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of a manifest."""
    ids = " ".join(map(str, manifest.frequent_ids))
    value = msgspec.structs.asdict(manifest) | {"frequent_ids": ids}
    if not manifest.index:
        del value["index"]
    return sealed_bytes(value)


def parse_manifest(path: Path, content: bytes) -> Manifest:
    """Parse and check a manifest. Reads no other file."""
    value = parse_json(path, content)
    with refuse_misfits(path, "manifest", _way_out(path)):
        value = msgspec.convert(value, dict[str, Any])
        _refuse_other_version(path, value.get("identity"))
        is_sealed = value.pop("seal", None) == sha256_of_json(value)
        value["frequent_ids"] = _parse_ids(value.get("frequent_ids"))
        manifest = msgspec.convert(value, Manifest)
        _check_settings(manifest)
        for index, entry in enumerate(manifest.shards):
            check_entry(entry, index, manifest.fingerprint)
        is_right = {
            "fingerprint does not match its settings": manifest.identity.fingerprint
            == manifest.fingerprint,
            "totals do not match its shards": totals_of(manifest.shards) == manifest.totals,
            "seal does not match its content": is_sealed,
        }
    for what, holds in is_right.items():
        if not holds:
            raise UserError(f"{path}: damaged or changed, its {what}: {_way_out(path)}")
    return manifest


def _parse_ids(text: Any) -> list[int]:
    """The ids in a manifest, which stores them as one string to save bytes."""
    if not isinstance(text, str):
        raise ValueError(f"frequent_ids is missing, or not a string: {shown(text)}")
    return [int(each) for each in text.split()]


def _check_settings(manifest: Manifest) -> None:
    """Raise ValueError for settings with which the folder cannot be read."""
    stage, settings = manifest.identity.stage, manifest.settings
    if stage not in _REQUIRED:
        raise ValueError(f"stage {shown(stage)} is not one of {', '.join(_REQUIRED)}")
    required = _REQUIRED[stage]
    if stage == "build-targets" and settings.get("precision") is not None:
        required = (*required, "max_support")
    for name in required:
        if name not in settings:
            raise ValueError(f"setting {name} is missing")
    checked = msgspec.convert(settings, _Settings)
    precisions = {"score": (SCORE_PRECISION,), "build-targets": PRECISIONS}.get(stage, ())
    if checked.precision not in (None, *precisions):
        what = f"precision {shown(checked.precision)} is not one of {stage}'s"
        raise ValueError(f"{what} - at `$.precision`")
    is_packed = manifest.identity.format_version == PACKED_SCORES_VERSION
    if stage == "score" and is_packed != (checked.precision is not None):
        raise ValueError("format_version does not match the precision")
    ids = manifest.frequent_ids
    if len(set(ids)) < len(ids) or not all(0 <= each < checked.vocab_size for each in ids):
        raise ValueError("frequent_ids holds an id twice, or an id outside the vocabulary")
    if manifest.shards and stage not in STAGES:
        raise ValueError(f"a folder made by {stage} has no shards")


def check_entry(entry: ShardEntry, index: int, fingerprint: str) -> None:
    """Raise ValueError for a shard of another index or folder."""
    name = shard_name(index)
    if entry.file != name:
        raise ValueError(f"{name}: file cannot be {quoted(entry.file)}")
    if entry.fingerprint != fingerprint:
        raise ValueError(f"{name}: fingerprint cannot be {quoted(entry.fingerprint)}")


def _way_out(path: Path) -> str:
    return f"restore it, or make {path.parent} again"


def totals_of(shards: list[ShardEntry]) -> dict[str, Any]:
    """The sums over the shards; `read` counts demonstrations, rejected ones included."""
    totals: dict[str, Any] = {
        name: sum(getattr(entry, name) for entry in shards)
        for name in ("rows", "tokens", "positions", "entries", "bytes")
    }
    totals["rejected"] = sum(len(entry.rejects) for entry in shards)
    totals["read"] = totals["rows"] + totals["rejected"]
    names = sorted({name for entry in shards for name in entry.sums})
    totals["sums"] = {name: sum(entry.sums.get(name, 0.0) for entry in shards) for name in names}
    return totals


def _refuse_other_version(path: Path, identity: Any) -> None:
    """Raise UserError for another format version, before any other field is checked."""
    match identity:
        case {"stage": str(stage), "format_version": found}:
            readable = readable_versions(stage)
            if type(found) is not int or found not in readable:
                versions = " and ".join(map(str, readable))
                raise UserError(
                    f"{path}: format version {shown(found)}, this qpipe reads {versions}: make it "
                    f"again with `qpipe {stage[:20]}`, or use the qpipe that made it"
                )


def first_difference(wanted: Identity, found: Identity) -> str:
    """The first field in which two identities differ, with both values, for a message."""
    left, right = _leaves(msgspec.to_builtins(wanted)), _leaves(msgspec.to_builtins(found))
    # the order of ids depends on other settings, which explain the difference better
    weight = {"stage": -1, "settings.support_order": 1}
    for name in sorted(left.keys() | right.keys(), key=lambda name: (weight.get(name, 0), name)):
        there, now = right.get(name, "absent"), left.get(name, "absent")
        if there != now:
            return f"{name} is {there} there and {now} now"
    return "nothing differs"


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a nested dict: names joined by dots, values as JSON."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value, ensure_ascii=False)}
    leaves = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        leaves |= _leaves(inner, name)
    return leaves
