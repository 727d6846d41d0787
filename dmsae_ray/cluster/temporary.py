"""The folder for temporary files, where a Ray cluster of our own would put its sockets and logs."""

from __future__ import annotations

import os
import tempfile

from dmsae_ray.cluster.address import cluster_address
from dmsae_ray.config import Config

LONGEST_SOCKET = 107
"""Bytes of the longest name that a socket may have on Linux."""


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
    socket = os.path.join(folder, "ray", session, "sockets", "plasma_store")
    if (length := len(os.fsencode(socket))) > LONGEST_SOCKET:
        over = length - LONGEST_SOCKET
        return (
            f"is {over} characters too long: Ray's sockets lie there, below a folder for each session, and no "
            f"socket's name may exceed {LONGEST_SOCKET}"
        )
    try:
        os.makedirs(os.path.join(folder, "ray"), exist_ok=True)
        with tempfile.TemporaryFile(dir=os.path.join(folder, "ray")):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
