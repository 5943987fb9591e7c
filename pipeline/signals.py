"""Handles SIGTERM, which schedulers and `kill` send to end a process, and Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 3.0  # seconds
_raised: dict[int, float] = {}  # when a signal last became an exception; shared by nested blocks


class Terminated(SystemExit):
    """The end of a process by SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Turn SIGTERM into an exception, as Ctrl-C is, so that cleanup code runs.

    Raises Terminated or KeyboardInterrupt in the block. A repeated signal within PATIENCE seconds,
    from a key pressed twice or held, is ignored, so that it does not interrupt the cleanup; a later
    one is not, since the cleanup may hang.
    """
    with _handled(signal.SIGTERM, _raises(Terminated)):
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as after `&` in a script
            yield
            return
        with _handled(signal.SIGINT, _raises(KeyboardInterrupt)):
            yield


@contextmanager
def notes_termination() -> Iterator[Callable[[], bool]]:
    """Only record SIGTERM; yields a function that returns whether it has come."""
    came: list[Any] = []
    # Python handles signals only in the main thread
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with _handled(signal.SIGTERM, lambda *_: came.append(True)):
        yield lambda: bool(came)


def _raises(error: type[BaseException]) -> Callable[..., None]:
    def handler(number: int, _: object) -> None:
        now = time.monotonic()
        if now < _raised.get(number, -PATIENCE) + PATIENCE:
            return
        _raised[number] = now
        raise error

    return handler


@contextmanager
def _handled(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
