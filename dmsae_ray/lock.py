"""One driver per output folder, and the generation that lets its workers know when they are superseded."""

from __future__ import annotations

import errno
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


def no_locks(home: Path, error: OSError) -> ValueError:
    """What to say of a file system that refuses a lock otherwise than because another driver holds it."""
    code = errno.errorcode.get(error.errno or 0, "")
    return ValueError(
        f"output folder {home}: its file system gives no lock ({error.strerror}, {code}), without which two drivers could write there. On NFS, "
        "start the lock service (rpc.statd, or mount with NFS 4, or with local_lock=flock if only one machine runs drivers); or give "
        "--output a folder on another file system"
    )


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
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._file.close()
                raise no_locks(home, error) from error
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise OutputBusy(
                f"output folder {home}: in use by another driver ({holder or 'unknown'}); wait for it, stop it, or give "
                "--output another folder"
            ) from None
        self.home = home
        try:
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}))
            self._file.flush()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); free space there, or give --output another folder") from error

    def lease(self) -> Lease:
        """Raise the generation: workers of earlier drivers can no longer commit."""
        path = self.home / "generation"
        try:
            previous = int(path.read_text())
        except FileNotFoundError:
            previous = 0
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: holds no number ({error}), which tells workers of earlier drivers that they are superseded. If none of them is at "
                "work any more, delete this file and run the same command again"
            ) from error
        with replacing(path) as temporary:
            temporary.write_text(str(previous + 1))
        return Lease(path, previous + 1)

    def release(self) -> None:
        self._file.close()
