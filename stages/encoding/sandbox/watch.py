"""Ends what takes too much time or memory, from another thread.

The other thread looks at long intervals, so that it costs next to nothing, and raises an exception
in the thread that it watches. This ends loops, but no single operation in C.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil

T = TypeVar("T")

MOST_SECONDS = 10.0  # of processor time; a rendering takes about a millisecond
MOST_GROWTH = 1 << 29  # bytes of the whole process
PERIOD = 0.05  # seconds
_SHORT = 0.1  # seconds of processor time; memory that grows meanwhile may be that of other threads


class TooMuchError(Exception):
    """Raised in a thread that takes too much."""

    def __str__(self) -> str:
        return f"it takes more than {MOST_SECONDS:g} s or {MOST_GROWTH >> 20:,} MiB of memory"


@dataclass(slots=True)
class _Run:
    """A call that is watched, as it was when it was first seen."""

    seconds: float | None = None  # of processor time that its thread had taken
    memory: int = 0
    ended: bool = False


_runs: dict[int, _Run] = {}  # by thread
_lock = threading.Lock()
_watcher = threading.Thread()


def watched(call: Callable[[], T]) -> T:
    """What a call returns. Raises TooMuchError if it takes too much.

    A call within another that is watched is a part of that one.
    """
    thread, run = threading.get_ident(), _Run()
    if thread in _runs:
        return call()
    if not _watcher.is_alive():  # not yet started, or left behind by a fork
        _start()
    _runs[thread] = run
    try:
        return call()
    finally:
        with _lock:
            _runs.pop(thread, None)
            if run.ended:  # the exception may still be to come
                _raise_in(thread, None)


def _start() -> None:
    global _watcher
    _watcher = threading.Thread(target=_watch, name="template limits", daemon=True)
    _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(PERIOD)
        for thread, run in list(_runs.items()):
            with _lock, suppress(OSError):  # the thread may have ended
                if _runs.get(thread) is run and not run.ended and _takes_too_much(thread, run):
                    run.ended = True
                    _raise_in(thread, TooMuchError)


def _takes_too_much(thread: int, run: _Run) -> bool:
    seconds = time.clock_gettime(time.pthread_getcpuclockid(thread))
    if run.seconds is None:
        run.seconds, run.memory = seconds, _memory()
    taken = seconds - run.seconds
    return taken > MOST_SECONDS or (taken > _SHORT and _memory() - run.memory > MOST_GROWTH)


def _memory() -> int:
    """The bytes of memory that this process has."""
    return psutil.Process().memory_info().rss


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an exception in a thread, or take back the one that it has not yet noticed."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)
