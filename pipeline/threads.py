"""Ordered results of work on several threads, and an iterator that prefetches items."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from time import perf_counter
from typing import Any, Generic, Self, TypeVar

THREAD_NAME = "in-order"
_END: Any = object()

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Given = TypeVar("_Given")


def in_order(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int | None = None,
    held: int | None = None,
) -> Iterator[_Result]:
    """Yield the function's result for each item, in order, computed on a thread for each core.

    At most `held` items are in progress or done at once, by default two for each thread. Threads
    save time if the work releases the interpreter, as numpy does. With one worker, an item is
    processed while the caller uses the one before, or makes the one after.
    """
    return _begun(function, items, workers, held, Future.result)


def in_progress(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int | None = None,
    held: int | None = None,
) -> Iterator[Future[_Result]]:
    """Yield what `in_order` yields, as futures: does not wait until a result is there."""
    return _begun(function, items, workers, held, lambda future: future)


def _begun(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int | None,
    held: int | None,
    give: Callable[[Future[_Result]], _Given],
) -> Iterator[_Given]:
    workers = workers or len(os.sched_getaffinity(0))
    held = held or 2 * workers
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers, THREAD_NAME) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == held:
                    yield give(waiting.popleft())
            while waiting:
                yield give(waiting.popleft())
        except GeneratorExit:  # the caller stops; after an error, begun items are finished
            pool.shutdown(cancel_futures=True)
            raise


class Prefetch(Generic[_Item]):
    """An iterator over items, of which a thread makes up to `ahead` in advance.

        with Prefetch(batches, ahead=4) as ready:
            for batch in ready:
                ...

    The thread starts with the first item and ends with the block, after the item in progress. An
    error in making an item is raised in place of the item. `waited` is the time in seconds that the
    consumer has waited.
    """

    def __init__(self, items: Iterable[_Item], ahead: int) -> None:
        iterator = iter(items)
        made = in_order(lambda _: next(iterator, _END), repeat(None), workers=1, held=ahead + 1)
        self._made: Any = made  # a generator
        self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        start = perf_counter()
        item = next(self._made, _END)
        self.waited += perf_counter() - start
        if item is _END:
            self._made.close()
            raise StopIteration
        return item
