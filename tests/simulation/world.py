"""Virtual time, processes in it that run real code, and files that count what is done to them.

A process is a greenlet: it runs until it waits, then the one whose turn is earliest goes on. An
operation on files is really done, and takes virtual time: it queues at the one server of their
names. A process may die at any wait, or at a chosen operation; it then does nothing more, as after
a SIGKILL: no temporary file is removed, and its locks end.
"""

import builtins
import fcntl
import heapq
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from greenlet import getcurrent, greenlet

NEVER = float("inf")
LISTED = 100  # names that a listing brings with one operation


class Killed(BaseException):
    """The end of a process."""


@dataclass(eq=False)
class Process:
    """Something that runs in a world."""

    dies_at: float = NEVER
    dies_at_operation: int = 0  # counted from 1; 0 is none
    slowness: float = 1.0  # how many times as long it takes for work
    is_dead: bool = False
    lost: float = 0.0  # seconds of work that died with it
    operations: int = 0
    ended: float = NEVER
    result: Any = None

    def die(self) -> None:
        """Do nothing more."""
        self.is_dead = True
        raise Killed


class World:
    """A clock, and the processes that wait for it; in place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._processes: dict[greenlet, Process] = {}
        self._waiting: list[tuple[float, int, greenlet]] = []
        self._turns = count()

    def spawn(
        self,
        process: Process,
        start: float,
        work: Callable[[], Any],
        at_end: Callable[[Process], None],
    ) -> None:
        """Run something from a time on; `at_end` is called when it has ended, or died."""

        def run() -> None:
            with suppress(Killed):
                process.result = work()
            process.ended = self.now
            at_end(process)

        thread = greenlet(run)
        self._processes[thread] = process
        self._wait_until(start, thread)

    def run(self) -> None:
        """Let everybody work until nobody is left."""
        while self._waiting:
            self.now, _, thread = heapq.heappop(self._waiting)
            thread.parent = getcurrent()
            thread.switch()
            if thread.dead:
                del self._processes[thread]

    @property
    def current(self) -> Process | None:
        """The process that runs now."""
        return self._processes.get(getcurrent())

    def sleep(self, seconds: float, is_work: bool = False) -> None:
        """Let time pass for the process that calls; outside of all, no time passes."""
        process = self.current
        if process is None:
            return
        if process.is_dead:
            raise Killed
        start, wake = self.now, self.now + seconds
        thread = getcurrent()
        self._wait_until(min(wake, process.dies_at), thread)
        assert thread.parent is not None
        thread.parent.switch()
        if process.dies_at <= wake:
            process.lost += self.now - start if is_work else 0.0
            process.die()

    def work(self, seconds: float) -> None:
        """Let the process that calls be busy for so long, or longer where it is slow."""
        process = self.current
        if process is not None:
            self.sleep(seconds * process.slowness, is_work=True)

    def monotonic(self) -> float:
        """The time, seconds."""
        return self.now

    def _wait_until(self, time: float, thread: greenlet) -> None:
        heapq.heappush(self._waiting, (time, next(self._turns), thread))


@dataclass
class Files:
    """What is done to the files of a folder.

    The server of their names does `rate` operations in a second, one after the other, and each
    takes `delay` seconds besides.
    """

    root: Path
    world: World = field(default_factory=World)
    rate: float = NEVER
    delay: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0  # of shards
    busy_until: float = 0.0

    @contextmanager
    def counted(self) -> Iterator["Files"]:
        """Count what happens within the block."""
        opens = self._opening(io.open)
        with (
            patch.multiple(os, **{name: self._counting(name) for name in _OPERATIONS}),
            patch.object(fcntl, "flock", self._locking(fcntl.flock)),
            patch.object(io, "open", opens),
            patch.object(builtins, "open", opens),
        ):
            yield self

    def _counting(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def operation(path: Any, *given: Any, **named: Any) -> Any:
            if not self._is_ours(path):
                return function(path, *given, **named)
            self._count(_OPERATIONS[name])
            found = function(path, *given, **named)
            if _OPERATIONS[name] != "list":
                return found
            listing = _Listing(found)
            self._count("list", len(listing) // LISTED)
            return listing

        return operation

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opens(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            if self._is_ours(path):
                self._count("create" if "w" in mode else "read")
            file = function(path, mode, *given, **named)
            if self._is_ours(path) and "w" not in mode and str(path).endswith(".arrow"):
                self.bytes_read += os.fstat(file.fileno()).st_size
            return file

        return opens

    def _locking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def locks(descriptor: int, kind: int) -> Any:
            self._count("lock")
            return function(descriptor, kind)

        return locks

    def _count(self, name: str, times: int = 1) -> None:
        process = self.world.current
        if process is not None:
            if process.is_dead:
                raise Killed
            process.operations += 1
            if process.operations == process.dies_at_operation:
                process.die()
        self.counts[name] += times
        self.busy_until = max(self.busy_until, self.world.now) + times / self.rate
        self.world.sleep(self.busy_until - self.world.now + self.delay)

    def _is_ours(self, path: Any) -> bool:
        # of what is synced, which is named by a descriptor, all is ours
        return isinstance(path, int) or str(path).startswith(str(self.root))


class _Listing(list[Any]):
    """The names in a folder, as `os.scandir` gives them."""

    def __enter__(self) -> "_Listing":
        return self

    def __exit__(self, *_: object) -> None:
        pass


_OPERATIONS = {
    "stat": "look",
    "open": "open",
    "mkdir": "create",
    "listdir": "list",
    "scandir": "list",
    "unlink": "remove",
    "replace": "rename",
    "fsync": "sync",
}
