"""One driver per output at a URL, where no file can be locked: a claim that its holder renews.

pyarrow's file systems cannot write a file on condition that it is not there. So a driver writes its claim, waits, and
has it if it is still the one that is there; whoever wrote last has it, and the others see that. A claim that is not
renewed while somebody watches is one of a driver that is gone. The clocks of the machines are never compared. What a
driver that only stood still may do when it goes on is decided by the generation (lock.py), not here.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from dmsae_ray.files import current, discard, publish

RENEW_S = 5.0
WATCH_S = 20.0
"""How long a claim is watched that may be that of a driver that is gone."""
SETTLE_S = 1.0
"""How long a new claim has to stand."""


class Claimed(RuntimeError):
    """Another driver has the output. The message is who."""


class Claim:
    """Held until `release`, or the end of the process."""

    def __init__(self, home: Path, token: str):
        """Raises Claimed, and StoreError if the server cannot be reached."""
        self.path, self.token = home / "claim", token
        self._renewed, self._end = 0, threading.Event()
        holder = read_claim(self.path)
        if holder is not None and not gone(self.path, holder):
            raise Claimed(f"pid {holder['pid']} on {holder['host']} since {holder['since']}")
        self.taken_over = holder is not None
        self._since = time.strftime("%F %T")
        self._write()
        time.sleep(SETTLE_S)
        now = read_claim(self.path)
        if now is None or now["token"] != token:
            raise Claimed("one that began at the same time")
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        self._renewed += 1
        tree = {
            "token": self.token,
            "pid": os.getpid(),
            "processes": _processes(),
            "host": socket.gethostname(),
            "since": self._since,
            "renewed": self._renewed,
        }
        self.path.write_text(json.dumps(tree))
        publish(self.path)

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            # A server that is away for a while is none of this thread's: whoever writes asks it again and again.
            with suppress(OSError, ValueError):
                holder = read_claim(self.path)
                if holder is not None and holder["token"] != self.token:
                    return  # another has it: the generation tells the workers
                self._write()

    def ours(self) -> bool:
        """Whether it still stands. Raises StoreError."""
        holder = read_claim(self.path)
        return holder is not None and holder["token"] == self.token

    def release(self) -> None:
        self._end.set()
        self._thread.join(2 * RENEW_S)  # it may be waiting for a server that is away
        with suppress(OSError, ValueError):
            if self.ours():
                discard(self.path)


def read_claim(path: Path) -> dict | None:
    """What the claim of an output says; None if there is none, or it is damaged. Raises StoreError."""
    try:
        tree = json.loads(current(path))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    known = {"token", "pid", "processes", "host", "since", "renewed"}
    return tree if isinstance(tree, dict) and known <= tree.keys() else None


def _processes() -> str:
    """Names what process ids count in here: the same in all processes that see each other's, on one machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def gone(path: Path, holder: dict) -> bool:
    """Whether the driver that holds a claim is no more: its process is not there, if it was one of this machine, or the
    claim is not renewed while it is watched.
    """
    if holder["processes"] and holder["processes"] == _processes() and not os.path.exists(f"/proc/{holder['pid']}"):
        return True
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(0.5)
        now = read_claim(path)
        if now is None:
            return True
        if (now["token"], now["renewed"]) != (holder["token"], holder["renewed"]):
            return False
    return True
