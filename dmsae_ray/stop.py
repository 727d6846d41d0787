"""Signals that ask a command to stop: Ctrl-C, and what scancel, docker stop, Kubernetes and a closed terminal send.

Each becomes a KeyboardInterrupt, so that there is one way out: what is at work is closed, and the command ends with
`INTERRUPTED`.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from dmsae_ray.causes import causes

INTERRUPTED = 130
"""Exit status of a command that was asked to stop."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEANING_S = 60.0
"""Further signals do not end the clean-up half-way, unless it has taken so long that it must be stuck."""
IGNORE_EVERY_S = 0.01
P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def stoppable() -> Iterator[None]:
    """While open, and for a command it decorates, the signals mean KeyboardInterrupt; those that are ignored (nohup)
    stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in its main thread only
        return
    handler = _Handler()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def keeping_signals(function: Callable[P, T]) -> Callable[P, T]:
    """A function after which the signals' handlers are the same as before.

    `ray.init` puts its own in their place, in Python and below it: one that is made for crashes and aborts the process
    three seconds after a SIGTERM, whatever the process does meanwhile.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            return function(*args, **kwargs)
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    return wrapped


@contextmanager
def deaf() -> Iterator[None]:
    """While open, the signals do nothing: around `ray.shutdown`, which takes every handler away below Python and then
    ends its processes for a second or two, in which a second signal would end the command half-way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    libc, over = ctypes.CDLL(None), threading.Event()
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def ignore() -> None:  # Python sets handlers in its main thread only, which is at work
        while not over.wait(IGNORE_EVERY_S):
            for number in SIGNALS:
                libc.signal(number, int(signal.SIG_IGN))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    thread = threading.Thread(target=ignore, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Handler:
    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._first = self._first or now
        # What is being handled while this runs tells whether the way out has begun; an interrupt that got lost is
        # raised again.
        cleaning = any(isinstance(link, KeyboardInterrupt) for link in causes(sys.exc_info()[1], contexts=True))
        if cleaning and now - self._first < CLEANING_S:
            return
        raise KeyboardInterrupt
