"""Work on several threads, its results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None = None
) -> Iterator[_Result]:
    """What the function makes of each item, on as many threads as this process has cores.

    Twice as many items are held as there are threads. It pays where the work is done by numpy and
    the like, which leave the interpreter free meanwhile. With one worker, one item is worked on
    while the caller is at the one before it, or makes the one behind it.
    """
    workers = workers or len(os.sched_getaffinity(0))
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
