"""One driver per output folder, and the generation that lets its workers know when they are superseded."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dmsae_ray.files import be_patient, current, elsewhere, guard, replacing
from dmsae_ray.ownership import STANDS_FOR, mark

if TYPE_CHECKING:
    from dmsae_ray.claim import Claim

T = TypeVar("T")
PATIENCE_S = 10.0
"""How long a generation that cannot be read is asked for again."""


class OutputBusy(RuntimeError):
    """Another driver works on this output folder."""


def no_locks(home: Path, error: OSError) -> ValueError:
    """What to say of a file system that refuses a lock otherwise than because another driver holds it."""
    code = errno.errorcode.get(error.errno or 0, "")
    return ValueError(
        f"output folder {home}: its file system gives no lock ({error.strerror}, {code}), without which two drivers "
        "could write there. On NFS, start the lock service (rpc.statd, or mount with NFS 4, or with local_lock=flock "
        "if only one machine runs drivers); or give --output a folder on another file system"
    )


class OutputLock:
    """Held for a driver's life; the operating system lets go of it however the driver ends. An output at a URL is
    claimed there as well (claim.py).

    Raises ValueError if the folder cannot be written or holds what is not ours under our names, OutputBusy if another
    driver holds it.
    """

    def __init__(self, home: Path):
        if elsewhere(home) is None and (home / STANDS_FOR).is_file():
            url = (home / STANDS_FOR).read_text().strip()
            raise ValueError(f"output folder {home}: stands for what lies at {url} on this machine; give --output that")
        self.path, self.token = home / "driver.lock", secrets.token_hex(6)
        self._claim: Claim | None = None
        self._raised: Lease | None = None
        """that of the generation that taking a claim over has raised already"""
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
            raise busy(home, holder or "unknown") from None
        self.home = home
        if elsewhere(home) is not None:
            from dmsae_ray.claim import Claim, Claimed

            try:
                self._claim = Claim(home, self.token)
                if self._claim.taken_over:
                    self._raised = self.lease()  # its workers may still be at work
            except BaseException as error:
                self._file.close()
                if isinstance(error, Claimed):
                    raise busy(home, str(error)) from None
                raise
        try:
            self._file.truncate(0)
            self._file.write(
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")})
            )
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); free space there, or give --output another folder"
            ) from error

    def lease(self) -> Lease:
        """Raise the generation: workers of earlier drivers can no longer commit."""
        if self._raised is not None:
            raised, self._raised = self._raised, None
            return raised
        path = self.home / "generation"
        try:
            previous = _generation(current(path))[0]
        except FileNotFoundError:
            previous = 0
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: holds no number ({error}), which tells workers of earlier drivers that they are superseded. "
                "If none of them is at work any more, delete this file and run the same command again"
            ) from error
        with replacing(path) as temporary:
            temporary.write_text(f"{previous + 1} {self.token}")
        lease = Lease(path, previous + 1, self.token)
        guard(self.home, lease.check)
        be_patient(self.home)
        return lease

    def holds(self) -> bool:
        """Whether the output is still this driver's: at a URL one that stood still for long may have lost it."""
        return self._claim is None or self._claim.ours()

    def release(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._file.close()


def busy(home: Path, holder: str) -> OutputBusy:
    """What to say of an output that another driver has."""
    return OutputBusy(
        f"output folder {home}: in use by another driver ({holder}); wait for it, stop it, or give --output another "
        "folder"
    )


def _generation(text: str) -> tuple[int, str]:
    """Its number, and the driver's token. Raises ValueError."""
    number, _, token = text.strip().partition(" ")
    return int(number), token


class Superseded(RuntimeError):
    """Another driver has taken the output folder over; this worker must stop without writing."""


class OutputUnseen(OSError):
    """The output folder cannot be read from here, now: no word on who owns it, so worth another try."""

    def __init__(self, path: Path | str, error: Exception | str):
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        seen = (
            f"{path}: {why} on node {socket.gethostname()}: this node does not see the output folder. All nodes must "
            "share it: mount it here, or give --output a folder that they share, or a URL"
        )
        super().__init__(error if isinstance(error, str) else seen)
        self.path = path

    def __reduce__(self):
        return OutputUnseen, (self.path, str(self))


@dataclass(frozen=True)
class Lease:
    """The right to write below an output folder, as long as its generation is the newest and, for a worker group, no
    later group of the same driver has taken its chains over.
    """

    path: Path
    generation: int
    token: str = ""
    """the driver's: two that took the folder over at the same moment have the same generation"""
    writer: Path | None = None
    """the file that says which worker group writes"""
    word: str = ""
    """what it says while that is this one"""

    def of_group(self, folders: list[Path]) -> Lease:
        """That of a new worker group, which takes these chains' folders over: from now on an earlier group that was
        thought lost, and comes back, has no right to write there. Raises Superseded.
        """
        self.check()
        word = secrets.token_hex(6)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "writer") as temporary:
                temporary.write_text(word)
        return replace(self, writer=folders[0] / "writer", word=word)

    def check(self) -> None:
        """Raises Superseded if a later driver has started: its number is larger, and nothing else counts as one. Or if
        a later worker group has.

        A file that cannot be read (a server that stutters, a handle that went stale) is tried again for PATIENCE_S
        seconds; then OutputUnseen is raised.
        """
        newest, token = _read(self.path, _generation)
        if newest > self.generation:
            raise Superseded(
                f"{self.path}: generation {newest} has taken over from {self.generation}; nothing was written"
            )
        if newest == self.generation and token and self.token and token != self.token:
            raise Superseded(f"{self.path}: another driver took the folder over at the same time; nothing was written")
        if self.writer is not None and _read(self.writer, str) != self.word:
            raise Superseded(f"{self.writer}: another worker group has taken the chain over; nothing was written")


def _read(path: Path, of: Callable[[str], T]) -> T:
    """What a small file holds now. Raises OutputUnseen."""
    end, wait = time.monotonic() + PATIENCE_S, 0.05
    while True:
        try:
            return of(current(path))
        except (OSError, ValueError) as error:
            why = error
        if time.monotonic() + wait > end:
            raise OutputUnseen(
                path, why if elsewhere(path) is None else str(why)
            )  # not from it: a ValueError among its causes would look like one to give up on
        time.sleep(wait)
        wait = min(2 * wait, 2.0)
