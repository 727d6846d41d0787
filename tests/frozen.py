"""A process that stands still while it is looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """Stopped between two instructions, so that the phase that is looked at is the one that is struck. Raises
    psutil.NoSuchProcess if it has ended.
    """
    process.suspend()
    while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
        time.sleep(0.001)
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()
