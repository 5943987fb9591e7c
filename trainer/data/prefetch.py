"""Makes items ready in a thread, while the consumer works on the one before."""

from collections import deque
from collections.abc import Iterable, Iterator
from threading import Condition, Thread
from time import perf_counter
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """An iterator over the items of another, of which up to `ahead` are made in advance.

        with Prefetch(batches, ahead=4) as ready:
            for batch in ready:
                ...

    The thread starts with the block, and ends with it however it is left, once the item in the
    making is done. What goes wrong in the thread is raised where the consumer asks for the item.
    `waited` counts the seconds that the consumer was kept waiting.
    """

    def __init__(self, items: Iterable[Item], ahead: int) -> None:
        assert ahead > 0
        self.waited = 0.0
        self._ahead = ahead
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._is_done = False  # no item will be added any more
        self._is_closed = False  # none is wanted any more
        self._changed = Condition()
        # a daemon, or a process that fails outside of the block would not end
        self._thread = Thread(target=self._work, args=(items,), name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        start = perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_done)
            self.waited += perf_counter() - start
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _work(self, items: Iterable[Item]) -> None:
        try:
            for item in self._wanted(iter(items)):
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._is_done = True
            self._changed.notify_all()

    def _wanted(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, each made only when there is room for it; no more once closed."""
        while self._has_room():
            try:
                yield next(items)
            except StopIteration:
                return

    def _has_room(self) -> bool:
        """Wait for room; False where the consumer has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._ahead)
            return not self._is_closed
