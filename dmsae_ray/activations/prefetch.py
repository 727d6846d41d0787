"""An iterator whose items are made in a thread of its own, a bounded number of them ahead of their use."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
END = object()


class Ahead(Generic[T]):
    """Items of `make()`, of which at most `depth` wait and one more is being made. Starts at once.

    What `make()` raises is raised where the item would have come.
    """

    def __init__(self, make: Callable[[], Iterable[T]], depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="ahead")
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._queue.get()
            if isinstance(item, _Raised):
                raise item.error
            if item is END:
                self._queue.put(END)  # for whoever asks again
                return
            yield item
            del item  # or it would live until the next one is there

    def close(self) -> None:
        """Let go of everything made ahead, and of the source."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        while not self._queue.empty():
            self._queue.get()
        self._queue.put(END)

    def _run(self, make: Callable[[], Iterable[T]]) -> None:
        try:
            items = iter(make())
            try:
                for item in items:
                    if not self._put(item):
                        return
                    del item  # the queue's, not ours: a block waits in memory as long as anyone names it
            finally:
                if hasattr(items, "close"):
                    items.close()
            self._put(END)
        except BaseException as error:
            self._put(_Raised(error))

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class _Raised:
    def __init__(self, error: BaseException):
        self.error = error
