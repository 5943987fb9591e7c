"""SIGTERM, with which schedulers and `kill` ask a process to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(SystemExit):
    """The end of a process that was asked to end; what it could not finish is to be made again."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def ends_when_terminated() -> Iterator[None]:
    """Make SIGTERM an exception, so that whatever is under work is left in order.

    Raises Terminated in the block where the signal comes.
    """

    def end(*_: object) -> None:
        raise Terminated

    with _handled(end):
        yield


@contextmanager
def notes_termination() -> Iterator[Callable[[], bool]]:
    """Only take note of SIGTERM: a function that tells whether it has come in the block."""
    came: list[Any] = []
    # Python lets no other thread than the first one handle signals
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with _handled(lambda *_: came.append(True)):
        yield lambda: bool(came)


@contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
