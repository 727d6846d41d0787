"""The terminal is ours: whatever libraries print goes to a log file instead, unless `--verbose`.

Ray writes from Python, from C++ and from threads of its own; only the file descriptors themselves catch all of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from dmsae_ray.secret_url import scrub_files, scrub_ours


def show_anything() -> None:
    """Standard output that cannot show a letter shows its number instead, and does not end the command with
    an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Screen:
    """While open, file descriptors 1 and 2 lead to `<log>.all`, and `stream` to the terminal. Calling it says a line
    there.

    Every line said is also kept, with the time, in `<home>/logs/<command>-<time>.log`.
    """

    def __init__(self, home: Path, command: str, verbose: bool):
        (home / "logs").mkdir(exist_ok=True)
        self.path = home / "logs" / time.strftime(f"{command}-%Y%m%d-%H%M%S.log")
        self.verbose = verbose
        self.stream: TextIO = sys.stdout
        self._log = open(self.path, "a", encoding="utf-8", errors="backslashreplace")
        self._saved: tuple[int, int] | None = None
        self._handler = _Say(self)

    def __enter__(self) -> Screen:
        if not self.verbose:
            sys.stdout.flush()
            sys.stderr.flush()
            self._saved = os.dup(1), os.dup(2)
            # As the terminal has it: what it cannot show (box lines, letters of a path) is replaced, never an error.
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            self.stream = os.fdopen(os.dup(1), "w", buffering=1, encoding=encoding, errors="backslashreplace")
            everything = os.open(self.path.with_suffix(".all"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(everything, 1)
            os.dup2(everything, 2)
            os.close(everything)
        logging.getLogger("dmsae_ray").addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("dmsae_ray").removeHandler(self._handler)
        if self._saved is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, saved in zip((1, 2), self._saved, strict=True):
                os.dup2(saved, target)
                os.close(saved)
            with contextlib.suppress(OSError):
                self.stream.close()
            self.stream = sys.stdout
        with contextlib.suppress(OSError):
            self._log.close()
        # Libraries and Ray print what they like.
        with contextlib.suppress(OSError):
            scrub_files(*(self.path.with_suffix(suffix) for suffix in (".all", ".ray")))

    def __call__(self, line: str) -> None:
        line = scrub_ours(line)
        with contextlib.suppress(OSError):  # a terminal that went away must not end a sweep
            print(line, file=self.stream, flush=True)
        with contextlib.suppress(OSError):  # nor must a full disk: what fills it ends the command with words of its own
            self._log.write(f"{time.strftime('%F %T')} {line}\n")
            self._log.flush()


class _Say(logging.Handler):
    """Our own warnings are our lines too."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen(f"warning: {record.getMessage()}")
