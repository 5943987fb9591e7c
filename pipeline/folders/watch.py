"""The progress bar and the logged events of a run."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..progress import log_event, progress_bar
from .manifest import ShardEntry

_RECENT = 30.0  # seconds over which the displayed speed is averaged


class Report(Protocol):
    """Reports progress within a shard; the arguments count what was made since the last call."""

    def __call__(self, demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None: ...


@dataclass(frozen=True, slots=True)
class Watcher:
    """The label of a run's bar, and the file of JSON lines for its events."""

    stage: str
    fingerprint: str
    log: Path | None = None
    label: str = ""  # of one task among several

    def log_event(self, event: str, **fields: Any) -> None:
        """Log an event of this stage."""
        log_event(self.log, event, stage=self.stage, fingerprint=self.fingerprint, **fields)


class Watch:
    """A run in progress: its bar, which counts demonstrations, and its events.

    `there` holds the shards made before the run; the other numbers are expected totals.
    """

    def __init__(
        self,
        watcher: Watcher,
        there: Iterable[ShardEntry],
        demonstrations: int | None,
        shards: int | None,
    ) -> None:
        there = list(there)
        self._watcher = watcher
        self._rejects = sum(len(entry.rejects) for entry in there)
        self._speed = Speed()
        read = sum(entry.rows for entry in there) + self._rejects
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
        """Measure speed from now on: the workers have started."""
        self._speed = Speed()
        self._bar.unpause()

    def report(self, demonstrations: int = 0, positions: int = 0, rejects: int = 0) -> None:
        """Count what was made; `demonstrations` includes rejected ones."""
        self._rejects += rejects
        speed = self._speed.add(positions)
        self._bar.set_postfix_str(f"{speed:,.0f} tok/s, {self._rejects:,} rejected", refresh=False)
        self._bar.update(demonstrations)

    def report_shard(self, entry: ShardEntry) -> None:
        """Count a whole shard, made by a worker that reports no progress within shards."""
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
    """A rate per second, averaged over the last 30 seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._sum = 0

    def add(self, count: int) -> float:
        """Add a count. Returns the present rate."""
        now = time.monotonic()
        self._counts.append((now, count))
        self._sum += count
        while len(self._counts) > 2 and self._counts[0][0] < now - _RECENT:
            self._counts.popleft()
            self._sum -= self._counts[0][1]  # counted before the window that starts at its time
        return self._sum / max(now - self._counts[0][0], 1e-9)
