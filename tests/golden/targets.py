"""Targets of every method in every form from the fixed scores, made by the command line."""

import json
from pathlib import Path
from typing import Any

from qpipe.pipeline.methods.table import choices
from qpipe.tests.support.commands import qpipe

from .pinned import arithmetic, hashes_of
from .scored import make_scores

FILE = Path(__file__).with_name("targets.json")
OTHERS = {  # what the defaults leave out
    "float16": ("--method", "sft+kl", "--precision", "float16", "--top-p", 0.9),
    "float32": (
        "--method",
        "gift",
        "--param",
        "beta=5",
        "--precision",
        "float32",
        "--max-support",
        8,
    ),
    "temperature": ("--teacher", "teacher", "--temperature", 2, "--teacher-temperature", 0.5),
}


def build_all(root: Path) -> dict[str, dict[str, str]]:
    """Make the scores and all targets in an empty folder; the hashes of each folder's files."""
    make_scores(root)
    for name, words in (_every_choice() | OTHERS).items():
        given = (root / word if word == "teacher" else word for word in words)
        qpipe("build-targets", "--scores", root / "scores", "--out", root / name, *given)
    easy = ("--where", "mean_tail_mass < 0.3")
    qpipe("subset", root / "scores", "--out", root / "subset of scores", *easy)
    qpipe("subset", root / "sft+kl live", "--out", root / "subset of targets", *easy)
    return {folder.name: hashes_of(folder) for folder in sorted(root.iterdir())}


def _every_choice() -> dict[str, tuple[Any, ...]]:
    return {
        f"{choice.method.name} {choice.form}": (
            *("--method", choice.method.name, "--form", choice.form),
            *(("--teacher", "teacher") if choice.needs_teacher else ()),
        )
        for choice in choices()
    }


def read_golden() -> dict[str, dict[str, dict[str, str]]]:
    """By `arithmetic()`, then by folder: the hashes that are pinned."""
    return json.loads(FILE.read_text())


def write_golden(root: Path) -> None:
    """Pin the targets for this machine; what other machines pinned is outdated and removed."""
    golden = {arithmetic(): build_all(root)}
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
