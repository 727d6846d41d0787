"""One driver per output folder, and the generation that lets its workers know when they are superseded."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from dmsae_ray.distill.folder import Lease
from dmsae_ray.files import replacing
from dmsae_ray.ownership import mark


class OutputBusy(RuntimeError):
    """Another driver works on this output folder."""


class OutputLock:
    """Held for a driver's life; the operating system lets go of it however the driver ends.

    Raises ValueError if the folder cannot be written or holds what is not ours under our names, OutputBusy if another driver holds it.
    """

    def __init__(self, home: Path):
        self.path = home / "driver.lock"
        try:
            home.mkdir(parents=True, exist_ok=True)
            mark(home)
            self._file = open(self.path, "a+")
        except OSError as error:
            raise ValueError(
                f"output folder {home}: cannot be written ({error.strerror}); give --output a folder you may write to"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise OutputBusy(
                f"output folder {home}: in use by another driver ({holder or 'unknown'}); wait for it, stop it, or give "
                "--output another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}))
        self._file.flush()
        self.home = home

    def lease(self) -> Lease:
        """Raise the generation: workers of earlier drivers can no longer commit."""
        path = self.home / "generation"
        try:
            previous = int(path.read_text())
        except FileNotFoundError:
            previous = 0
        with replacing(path) as temporary:
            temporary.write_text(str(previous + 1))
        return Lease(path, previous + 1)

    def release(self) -> None:
        self._file.close()
