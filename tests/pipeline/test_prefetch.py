"""What a prefetching thread promises: order, a bound, errors that arrive, and an end."""

import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import count
from threading import Event
from time import perf_counter, sleep

import pytest
from qpipe.pipeline.threads import THREAD_NAME, Prefetch


class Counting:
    """Numbers without end, and how many of them were made."""

    def __init__(self) -> None:
        self.made = 0

    def __iter__(self) -> Iterator[int]:
        for number in count():
            self.made += 1
            yield number


def settled(value: object) -> bool:
    """Whether something comes about within ten seconds."""
    end = perf_counter() + 10
    while not value() and perf_counter() < end:  # type: ignore[operator]
        sleep(0.005)
    return value()  # type: ignore[operator]


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_all_items_in_order(ahead: int) -> None:
    with Prefetch(range(50), ahead) as ready:
        assert list(ready) == list(range(50))
        assert list(ready) == []
    assert workers() == []


def test_no_more_than_the_bound_is_made() -> None:
    items = Counting()
    with Prefetch(items, 3) as ready:
        assert items.made == 0  # nothing before the first item is asked for
        assert next(ready) == 0
        assert settled(lambda: items.made == 4)
        sleep(0.05)
        assert items.made == 4
        assert [next(ready), next(ready)] == [1, 2]
        assert settled(lambda: items.made == 6)
        sleep(0.05)
        assert items.made == 6


def test_items_are_made_while_the_consumer_works() -> None:
    """A second item arrives although nobody has asked for it."""
    made = Event()

    def items() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    with Prefetch(items(), 2) as ready:
        assert next(ready) == 0
        assert made.wait(10)


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("a damaged shard")

    with Prefetch(items(), 5) as ready:
        assert [next(ready), next(ready)] == [1, 2]
        with pytest.raises(ValueError, match="a damaged shard"):
            next(ready)
        assert list(ready) == []  # as after any generator's error
    assert workers() == []


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_breaking_off_ends_the_thread(taken: int) -> None:
    items = Counting()
    start = perf_counter()
    with Prefetch(items, 2) as ready:
        for _ in range(taken):
            next(ready)
        made = taken + 2 if taken else 0
        assert settled(lambda: items.made == made)
    assert workers() == []
    assert items.made == made
    assert perf_counter() - start < 5


def test_an_error_of_the_consumer_ends_the_thread() -> None:
    def consume() -> None:
        with Prefetch(Counting(), 2) as ready:
            next(ready)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        consume()
    assert workers() == []


def test_the_item_in_the_making_is_the_last() -> None:
    """Closing waits for it, then asks for no other, and lets go of the source."""
    begun, go_on = Event(), Event()

    class Source:
        def __iter__(self) -> Iterator[int]:
            yield 0
            begun.set()
            assert go_on.wait(10)
            yield 1
            raise AssertionError("asked for more")

    source = Source()
    alive = weakref.ref(source)
    prefetch = Prefetch(source, 5)
    del source
    with prefetch:
        assert next(prefetch) == 0
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
    assert workers() == []
    gc.collect()
    assert alive() is None


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[int]:
        for number in range(4):
            sleep(0.1)
            yield number

    with Prefetch(slow(), 2) as ready:
        list(ready)
        assert 0.2 < ready.waited < 5


def test_no_waiting_for_what_is_ready() -> None:
    items = Counting()
    with Prefetch(items, 3) as ready:
        next(ready)
        first = ready.waited
        assert settled(lambda: items.made == 4)
        sleep(0.01)
        for _ in range(3):
            next(ready)
        assert ready.waited - first < 1
