"""The end of a process's log, kept in the output folder: what of it outlives the process, its node and the cluster."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dmsae_ray.files import elsewhere, replacing
from dmsae_ray.secret_url import scrub

FIRST_S, EVERY_S = 2.0, 30.0
"""When what is there is first written, and how often then, if there is more."""
MOST_BYTES = 256 << 10
"""Of each file, from its end."""
LAST_S = 20.0
"""How long the last writing may hold the end up."""


class KeptLog:
    """While open, the ends of files that grow are one file of the output, written anew where they have grown, and once
    more at the end, with the error if there is one.

    Never raises: what it tells of matters more.
    """

    def __init__(self, sources: Sequence[Path], to: Path, heading: str = ""):
        """to: the file in the output folder; where that is at a URL, it is there alone. heading: its first line."""
        self.sources, self.to, self.heading = sources, to, heading
        self._error, self._over = "", threading.Event()
        self._written: tuple[list[int], str] = [0] * len(sources), ""
        """sizes of the files as they were last written, and the error"""
        self._thread = threading.Thread(target=self._run, name="kept-log", daemon=True)

    def __enter__(self) -> KeptLog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._error = "".join(traceback.format_exception(error))
        self._over.set()
        self._thread.join(LAST_S)

    def _run(self) -> None:
        wait = FIRST_S
        while not self._over.wait(wait):
            self._write()
            wait = EVERY_S
        self._write()

    def _write(self) -> None:
        state = [_size(path) for path in self.sources], self._error
        if state == self._written:
            return
        text = self.text()
        # A server that is away, a disk that is full, an output that another driver has now, an interpreter that ends.
        with suppress(OSError, ValueError, RuntimeError):
            if (place := elsewhere(self.to)) is None:
                self.to.parent.mkdir(exist_ok=True)
                with replacing(self.to) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            else:
                with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    place.send(Path(file.name), self.to)
            self._written = state

    def text(self) -> str:
        """What is kept at this moment, without secrets; empty if there is nothing."""
        parts = [part for path in self.sources if (part := _end(path))] + [self._error] * bool(self._error)
        heading = [f"{self.heading}\n"] if self.heading and parts else []
        return scrub("".join(heading + parts))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _end(path: Path) -> str:
    """Of a file, as text; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST_BYTES))
            text = file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return f"[{size - MOST_BYTES:,} bytes before this are left out]\n{text}" if size > MOST_BYTES else text
