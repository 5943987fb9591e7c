"""What the commands make undisturbed, and how what they made under faults is judged by it."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import read_scores, read_targets
from qpipe.tests.support.processes import Command, Fault, start

COUNTS = ("kills", "other faults", "resumes", "lost", "duplicated", "wrong", "left over")
TALLY: dict[str, Counter[str]] = {}  # of each command; tests/faults/conftest.py prints it
_TIMINGS = ("tokens_per_second", "seconds_waited_in_all", "seconds")


@dataclass(frozen=True, slots=True)
class Work:
    """A command that lacks its output folder, the last word, and what it makes undisturbed."""

    name: str
    words: tuple[object, ...]
    undisturbed: Path
    seconds: float = 0.0  # that it takes, undisturbed
    environment: Mapping[str, str] | None = None

    def start(
        self,
        out: Path | str,
        *more: object,
        fault: str = "",
        at: int = 0,
        victim: Path | None = None,
        has_privileges: bool = True,
    ) -> Command:
        """Start it, with a fault to come (see `Fault`)."""
        coming = Fault(fault, at, Path(out), victim) if fault else None
        output = self.undisturbed.with_name(f"{self.name}-{os.urandom(6).hex()}.txt")
        words = (*self.words, out, *more)
        return start(
            *words,
            output=output,
            fault=coming,
            environment=self.environment,
            has_privileges=has_privileges,
        )

    def status(self, out: Path) -> str:
        """What `qpipe status` says of a folder."""
        command = start("status", out, output=out.with_name(f"{out.name}.txt"))
        assert command.wait() == 0, command.said
        return command.said

    def strike(self, out: Path, fault: str, at: int, **how: Any) -> Command:
        """Start it with a fault other than a kill to come, and wait for its end."""
        command = self.start(out, fault=fault, at=at, **how)
        command.wait()
        self.count("other faults")
        return command

    def count(self, name: str, number: int = 1) -> None:
        """Count something for the table at the end."""
        TALLY.setdefault(self.name, Counter())[name] += number

    def resume(self, out: Path) -> None:
        """Run it to its end, which must make the same as undisturbed and leave nothing else."""
        command = self.start(out)
        assert command.wait() == 0, command.said
        self.count("resumes")
        self.judge(out)

    def judge(self, out: Path) -> None:
        """Count what is wrong with a finished folder, which must be nothing."""
        found = problems(out, self.undisturbed)
        for name, those in found.items():
            self.count(name, len(those))
        assert not any(found.values()), (self.name, found)


def problems(out: Path, undisturbed: Path) -> dict[str, list[str]]:
    """What is wrong with a finished folder, compared with what was made undisturbed."""
    ours, theirs = contents(out), contents(undisturbed)
    found, expected = Counter(items(out)), Counter(items(undisturbed))
    return {
        "lost": sorted((expected - found).elements()),
        "duplicated": sorted((found - expected).elements()),
        "wrong": sorted(name for name in theirs if ours.get(name) != theirs[name]),
        "left over": sorted(ours.keys() - theirs.keys()),
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, and in those below it; the times that a training took left out."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return {str(path.relative_to(folder)): _content(path) for path in paths}


def _content(path: Path) -> bytes:
    if path.is_dir():
        return b"a folder"
    content = path.read_bytes()
    if path.name == "log.jsonl":
        events = [_untimed(json.loads(line)) for line in content.splitlines()]
        return json.dumps(events).encode()
    if path.name == "qpipe.json":
        record = json.loads(content)
        del record["settings"]["out"]
        record["results"] = _untimed(record["results"])
        return json.dumps(record).encode()
    return content


def _untimed(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in _TIMINGS}


def items(folder: Path) -> list[str]:
    """What a folder must account for: its demonstrations, or the steps of a training."""
    if (folder / "log.jsonl").exists():
        events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [f"{event['event']} {event['step']}" for event in events]
    manifest = read_manifest(folder)
    read = read_scores if manifest.identity.stage == "score" else read_targets
    rejects = (folder / "rejects.jsonl").read_text().splitlines()
    return [example.id for example in read(folder)] + rejects
