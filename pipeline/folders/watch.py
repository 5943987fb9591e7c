"""The progress bar and the events of a running stage."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..progress import log_event, progress_bar
from .manifest import ShardEntry

_RECENT = 30.0  # seconds that the speed shown is taken over


class Report(Protocol):
    """How the making of a shard tells how far it is."""

    def __call__(self, demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None: ...


@dataclass(frozen=True, slots=True)
class Watcher:
    """Where a stage's runs are watched: what the bar is called, and a file of JSON lines."""

    stage: str
    fingerprint: str
    log: Path | None = None
    label: str = ""  # of one among several tasks

    def watch(
        self, there: Iterable[ShardEntry], demonstrations: int | None, shards: int | None
    ) -> "Watch":
        """Watch a run that is to make so many demonstrations and shards, some of them there."""
        return Watch(self, list(there), demonstrations, shards)

    def log_event(self, event: str, **fields: Any) -> None:
        """Log an event of this stage."""
        named = {"stage": self.stage, "fingerprint": self.fingerprint}
        log_event(self.log, event, **named, **fields)


class Watch:
    """A run under way: its bar, which counts demonstrations, and its events."""

    def __init__(
        self,
        watcher: Watcher,
        there: list[ShardEntry],
        demonstrations: int | None,
        shards: int | None,
    ) -> None:
        self._watcher = watcher
        self._rejects = sum(len(entry.rejects) for entry in there)
        self._speed = Speed()
        read = sum(entry.rows + len(entry.rejects) for entry in there)
        watcher.log_event(
            "start", shards=shards, committed=len(there), demonstrations=demonstrations
        )
        name = f"{watcher.stage} {watcher.label}".rstrip()
        self._bar = progress_bar(total=demonstrations, initial=read, desc=name, unit="demo")

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self) -> None:
        """Take the time from now on: what makes the shards has started."""
        self._speed = Speed()
        self._bar.unpause()

    def report(self, demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None:
        """Count what has been made; `demonstrations` includes those rejected."""
        self._rejects += rejects
        speed = self._speed.add(positions)
        self._bar.set_postfix_str(f"{speed:,.0f} tok/s, {self._rejects:,} rejected", refresh=False)
        self._bar.update(demonstrations)

    def report_shard(self, entry: ShardEntry) -> None:
        """Count a shard that was made where none of its progress is seen."""
        self.report(entry.rows + len(entry.rejects), entry.positions, len(entry.rejects))

    def committed(self, index: int, entry: ShardEntry, seconds: float | None = None) -> None:
        """Log a shard that this run has committed."""
        self._watcher.log_event(
            "shard",
            index=index,
            rows=entry.rows,
            rejects=len(entry.rejects),
            tokens=entry.tokens,
            positions=entry.positions,
            bytes=entry.bytes,
            seconds=seconds,
        )


class Speed:
    """How many of something come in a second, over the last half minute."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._sum = 0

    def add(self, count: int) -> float:
        """Count some; the speed now."""
        now = time.monotonic()
        self._counts.append((now, count))
        self._sum += count
        while len(self._counts) > 2 and self._counts[0][0] < now - _RECENT:
            self._counts.popleft()
            self._sum -= self._counts[0][1]  # counts came in the time before their entry
        return self._sum / max(now - self._counts[0][0], 1e-9)
