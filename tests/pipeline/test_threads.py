"""Work on several threads: order, errors, and how far ahead it goes."""

import os
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest
from qpipe.pipeline.threads import in_order, in_progress

WORKERS = 3


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(WORKERS)))


def test_results_come_in_the_order_of_the_items_whichever_is_done_first() -> None:
    finished: list[int] = []

    def late(item: int) -> int:
        time.sleep(0.02 if item % WORKERS == 0 else 0)
        finished.append(item)
        return item * item

    assert list(in_order(late, range(20))) == [item * item for item in range(20)]
    assert finished != sorted(finished)


@pytest.mark.parametrize("size", [0, 1, WORKERS, 2 * WORKERS - 1, 2 * WORKERS, 2 * WORKERS + 1])
def test_as_many_results_come_as_there_are_items(size: int) -> None:
    assert list(in_order(str, range(size))) == [str(item) for item in range(size)]


def test_as_many_items_are_worked_on_at_a_time_as_there_are_cores() -> None:
    meeting = threading.Barrier(WORKERS)
    here: set[int] = set()
    most: list[int] = []

    def meet(item: int) -> None:
        here.add(item)
        most.append(len(here))
        meeting.wait(timeout=20)  # breaks unless as many threads come here together
        here.discard(item)

    assert list(in_order(meet, range(4 * WORKERS))) == [None] * (4 * WORKERS)
    assert max(most) <= 2 * WORKERS  # some may not have left yet when the next ones come


def test_one_worker_is_at_one_item_while_the_caller_is_at_another() -> None:
    done = [threading.Event() for _ in range(4)]
    results = in_order(lambda item: done[item].set() or item, range(4), workers=1)
    for item in range(3):
        assert next(results) == item
        assert done[item + 1].wait(timeout=20)
    assert list(results) == [3]


def test_items_are_taken_only_so_far_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for item in count(1):
            taken.append(item)
            yield item

    results = in_order(str, endless())
    assert taken == []  # nothing before the first result is asked for
    for asked in range(1, 50):
        assert next(results) == str(asked)
        assert len(taken) == asked + 2 * WORKERS - 1
    results.close()
    assert len(taken) == 49 + 2 * WORKERS - 1


def test_an_items_error_comes_in_its_place() -> None:
    def fail_at_5(item: int) -> int:
        if item == 5:
            raise ValueError("item 5 is broken")
        return item

    results = in_order(fail_at_5, range(100))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="item 5 is broken"):
        next(results)
    assert list(results) == []


def test_an_error_among_the_last_items_is_not_lost() -> None:
    def fail_at_2(item: int) -> int:
        if item == 2:
            raise ValueError("item 2 is broken")
        return item

    results = in_order(fail_at_2, range(3))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2 is broken"):
        next(results)


def test_an_error_of_the_items_themselves_reaches_the_caller() -> None:
    def damaged() -> Iterator[int]:
        yield from range(2 * WORKERS)
        raise OSError("the shard is damaged")

    results = in_order(str, damaged())
    assert next(results) == "0"
    with pytest.raises(OSError, match="the shard is damaged"):
        list(results)


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    results = in_order(str, range(100))
    next(results)
    assert set(threading.enumerate()) > before
    results.close()

    assert set(threading.enumerate()) == before


def test_futures_come_before_their_results() -> None:
    may_end = threading.Event()
    futures = in_progress(lambda _: may_end.wait(20), range(4), workers=1, held=2)
    first, second = next(futures), next(futures)
    assert not first.done()
    may_end.set()
    assert first.result()
    assert second.result()
    assert len(list(futures)) == 2
