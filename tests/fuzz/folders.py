"""Small sealed folders to be spoilt, and everything that reads one."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.mixing import read_mix, write_mix
from qpipe.pipeline.folders.sealed import read_scores, read_targets
from qpipe.pipeline.storage.json_files import json_bytes, sha256_of_json
from qpipe.stages.folders.lineage import generations
from qpipe.stages.folders.listing import catalogue
from qpipe.stages.folders.status import status_of
from qpipe.stages.folders.verify import verify
from qpipe.stages.looking.inspect import inspect
from qpipe.stages.looking.settings import InspectSettings
from qpipe.tests.support.examples import random_scored
from qpipe.tests.support.folders import SCORES, build, seal

from .inputs import folder_until_exit, made_or_refused

STAGES = ("score", "build-targets", "mix")


@cache
def whole(stage: str) -> Path:
    """A folder of five demonstrations in two shards, or a mixture. Not to be changed."""
    root = folder_until_exit()
    scores = make_scores(root / "score")
    build(scores, root / "build-targets")
    build(scores, root / "others", top_p=0.5)
    write_mix(root / "mix", [(root / "build-targets", 3.0), (root / "others", 1.0)])
    return root / stage


def make_scores(folder: Path) -> Path:
    """Scores of five demonstrations of up to four positions."""
    examples = [random_scored(number) for number in range(5)]
    return seal(folder, "score", SCORES, [examples[:3], examples[3:]])


@contextmanager
def copied(stage: str) -> Iterator[Path]:
    """A copy to be changed, beside copies of those that it refers to."""
    original = whole(stage)
    with tempfile.TemporaryDirectory() as root:
        yield Path(shutil.copytree(original.parent, Path(root) / "all")) / original.name


def read_all(folder: Path) -> bool:
    """Everything that reads a folder; whether its rows can be read."""
    made_or_refused(lambda: list(generations(read_manifest(folder))))
    made_or_refused(lambda: status_of(folder))
    made_or_refused(lambda: list(verify(folder)))
    made_or_refused(lambda: read_mix(folder))
    made_or_refused(lambda: list(catalogue(folder.parent)))
    made_or_refused(lambda: inspect(InspectSettings(folder=folder, random=2)))
    rows = [
        made_or_refused(lambda read=read: list(read(folder)))
        for read in (read_scores, read_targets)
    ]
    return any(each is not None for each in rows)


def resealed(value: Any) -> bytes:
    """A manifest's content with every fingerprint, total and seal that can be made to fit."""
    try:
        value.pop("seal", None)
        value["fingerprint"] = sha256_of_json(value["identity"])
        for entry in value["shards"]:
            entry["fingerprint"] = value["fingerprint"]
        for name in ("rows", "tokens", "positions", "entries", "bytes"):
            value["totals"][name] = sum(entry[name] for entry in value["shards"])
        value["totals"]["rejected"] = sum(len(entry["rejects"]) for entry in value["shards"])
        value["totals"]["read"] = value["totals"]["rows"] + value["totals"]["rejected"]
        value["seal"] = sha256_of_json(value)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        pass  # what was spoilt is what these are made from
    return as_bytes(value)


def as_bytes(value: Any) -> bytes:
    """As it would be stored, or the nearest to it."""
    try:
        return json_bytes(value)
    except (ValueError, RecursionError, TypeError):
        pass
    try:
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except (RecursionError, TypeError):
        return b"[" * 5000
