"""Signals that ask a process to end."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace

import pytest
from qpipe.pipeline import signals as termination
from qpipe.pipeline.signals import Terminated, ends_in_order

_TESTS = count()
ENDS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that nobody has asked to end, and that handles signals as before afterwards."""
    later = 3600 * next(_TESTS)  # than the signals of the tests before
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later)
    monkeypatch.setattr(termination, "time", clock)
    handlers = {number: signal.getsignal(number) for number in ENDS}
    yield
    assert handlers == {number: signal.getsignal(number) for number in ENDS}


def ask(number: int) -> None:
    os.kill(os.getpid(), number)


def steps_of_one_asked_twice(
    number: int, meanwhile: Callable[[], None] = lambda: None
) -> list[str]:
    """What is done by a block that is asked to end, and again while it puts things in order."""
    steps: list[str] = []
    with pytest.raises(ENDS[number]):
        asked_twice(number, meanwhile, steps)
    return steps


def asked_twice(number: int, meanwhile: Callable[[], None], steps: list[str]) -> None:
    with ends_in_order():
        try:
            with ends_in_order():
                ask(number)
                steps.append("went on")
        finally:
            meanwhile()
            ask(number)
            steps.append("put in order")


@pytest.mark.parametrize("number", ENDS)
def test_asked_twice_it_ends_once(number: int) -> None:
    assert steps_of_one_asked_twice(number) == ["put in order"]


@pytest.mark.parametrize("number", ENDS)
def test_what_hangs_while_it_puts_things_in_order_can_be_ended(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_long() -> None:
        monkeypatch.setattr(termination, "PATIENCE", 0.0)

    assert steps_of_one_asked_twice(number, wait_long) == []


def test_ctrl_c_that_was_to_be_ignored_is() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ends_in_order():
            ask(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
