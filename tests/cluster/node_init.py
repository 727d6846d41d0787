"""The first process of a node of a box: makes what the node sees of the disk, then looks after orphaned processes.

`unshare` has put it into namespaces of its own; when it ends, the kernel ends all that runs there. It ends by itself
when its standard input does, which is when the process that made the box has gone, however it went. It stands alone:
nothing of the tests is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
"""Flags of mount(2)."""
DETACH = 2
"""A flag of umount2(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: Path | str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    if _libc.mount(*(os.fsencode(text) for text in (source, target, kind)), ctypes.c_ulong(flags), options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {target} ({kind or hex(flags)}): {os.strerror(code)}")


def read_only(target: Path | str) -> None:
    """This mount alone; those below it stay as they are."""
    kept = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC)
    mount("none", target, flags=REMOUNT | BIND | RDONLY | kept)


def mounts_below(folder: Path) -> list[str]:
    """Every mount at or below a folder, the outermost first."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
        if Path(place).is_relative_to(folder):
            found.add(place)
    return sorted(found)


def view(disk: Path, own: list[str], seen: list[str], share: str | None, hosts: str) -> None:
    """The disk as the node sees it: this machine's, read only, without what is in the folders `own`, which are the
    node's and lie in `disk`; of what they hide only the paths in `seen` are there, and `share` at /share.
    """
    mount("none", "/", flags=REC | PRIVATE)
    root = disk / "rootfs"
    root.mkdir(exist_ok=True)
    mount("tmpfs", root, "tmpfs", options="mode=755,size=1m")
    for entry in Path("/").iterdir():
        if entry.is_symlink():
            (root / entry.name).symlink_to(os.readlink(entry))
        elif entry.is_dir():
            (root / entry.name).mkdir()
            if str(entry) not in (*own, "/proc"):
                mount(entry, root / entry.name, flags=BIND | REC)
    for place in mounts_below(root)[1:]:
        read_only(place)
    mount("proc", root / "proc", "proc")
    mount("tmpfs", root / "dev/shm", "tmpfs", options="mode=1777")

    def put(source: Path | str, at: str) -> Path:
        target = root / at.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        mount(source, target, flags=BIND)
        return target

    for at in own:
        inside = disk / at.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        inside.chmod(0o1777 if at.endswith("tmp") else 0o755)
        put(inside, at)
    for at in seen:
        read_only(put(at, at))
    if share:
        put(share, "/share")
    (disk / "resolv.conf").touch()  # names are in /etc/hosts alone: nobody waits for a server that is not there
    for source, at in ((hosts, "etc/hosts"), (disk / "resolv.conf", "etc/resolv.conf")):
        if (root / at).exists():
            mount(source, root / at, flags=BIND)
    (root / ".before").mkdir()
    os.chdir(root)
    subprocess.run(["pivot_root", ".", ".before"], check=True)
    os.chdir("/")
    if _libc.umount2(b"/.before", DETACH):
        raise OSError(ctypes.get_errno(), "umount of what was there before")
    os.rmdir("/.before")
    read_only("/")


def look_after_orphans() -> None:
    """Until standard input ends."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        ready = select.select([0, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
        if 0 in ready and not os.read(0, 4096):
            return


if __name__ == "__main__":
    of_node = json.loads(sys.argv[1])
    socket.sethostname(of_node.pop("name"))
    view(Path(of_node.pop("disk")), **of_node)
    print("ready", flush=True)
    look_after_orphans()
