"""How many requests of this process a server holds up: refused, or not answered, and soon to be made again."""

from __future__ import annotations

import threading
from collections.abc import Callable


class HeldUp:
    """A context that a request is in while it waits to be made again."""

    def __init__(self) -> None:
        self.count = 0
        self._tell: list[Callable[[int], None]] = []
        self._lock = threading.Lock()

    def tell(self, listener: Callable[[int], None]) -> None:
        """Call it with the number now, and from now on with every other one. It must not raise."""
        self._tell.append(listener)
        listener(self.count)

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def _add(self, more: int) -> None:
        with self._lock:
            self.count += more
            for listener in self._tell:
                listener(self.count)


REQUESTS = HeldUp()
"""The process's."""
