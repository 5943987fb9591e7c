"""SIGTERM, with which schedulers and `kill` ask a process to end, and Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 3.0  # seconds
_raised: dict[int, float] = {}  # when a signal last became an exception: blocks may be nested


class Terminated(SystemExit):
    """The end of a process that was asked to end; what it could not finish is to be made again."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Make SIGTERM an exception, as Ctrl-C is, so that whatever is under work is left in order.

    Raises Terminated or KeyboardInterrupt in the block where the signal comes. Once more within
    PATIENCE seconds it is the same wish, of one who presses twice or holds the key, and does not
    disturb what is being put in order; later it does, since that may hang.
    """
    with _handled(signal.SIGTERM, _raises(Terminated)):
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind `&` in a script
            yield
            return
        with _handled(signal.SIGINT, _raises(KeyboardInterrupt)):
            yield


@contextmanager
def notes_termination() -> Iterator[Callable[[], bool]]:
    """Only take note of SIGTERM: a function that tells whether it has come in the block."""
    came: list[Any] = []
    # Python lets no other thread than the first one handle signals
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
