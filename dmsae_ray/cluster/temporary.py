"""The folder for temporary files, where a Ray cluster of our own would put its sockets and logs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from dmsae_ray.cluster.address import cluster_address
from dmsae_ray.config import Config

LONGEST_SOCKET = 107
"""Bytes of the longest name that a socket may have on Linux."""


PREFIX = "dmsae-ray-"
"""Of our own folder in it; what `tempfile` adds to the name has eight characters."""
NEW_S = 60.0
"""A folder that is younger may not be held yet."""
_held: dict[Path, IO[str]] = {}


def private_folder() -> Path:
    """A new folder that other users of the machine cannot enter, for that of a Ray of our own: Ray lets everybody read
    and write in there, sockets and logs included. Removes those that killed commands left. Raises OSError.
    """
    place = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # as Ray chooses
    for left in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            if left.stat().st_uid == os.getuid() and time.time() - left.stat().st_mtime > NEW_S and _hold(left):
                remove(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    _hold(folder)
    return folder


def _hold(folder: Path) -> bool:
    """Whether the folder is nobody's but this process's, which has it until it ends, or the folder is removed."""
    lock = open(folder / "held", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return False
    _held[folder] = lock
    return True


def remove(folder: Path) -> None:
    """Processes of Ray that are ending may still write there."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)
    if (lock := _held.pop(folder, None)) is not None:
        lock.close()


def check_temporary_folder(config: Config) -> None:
    """Ray could begin a session there. Raises ValueError that names the variable and the remedy; asks only where Ray is
    not joined.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if name is None:
        return  # Ray takes /tmp
    problem = _problem(os.environ[name])
    if problem is not None and cluster_address(config) is None:
        raise ValueError(
            f"{name} {os.environ[name]!r}: {problem}. Set {name} to a short folder that can be written, such as /tmp"
        )


def _problem(folder: str) -> str | None:
    if not os.path.isabs(folder):
        return "is not the whole path of a folder"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    socket = os.path.join(folder, PREFIX + 8 * "x", "ray", session, "sockets", "plasma_store")
    if (length := len(os.fsencode(socket))) > LONGEST_SOCKET:
        over = length - LONGEST_SOCKET
        return (
            f"is {over} characters too long: Ray's sockets lie there, below a folder for each session, and no "
            f"socket's name may exceed {LONGEST_SOCKET}"
        )
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
