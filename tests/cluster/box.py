"""Several machines in a box: nodes with a network, a disk, processes and a host name of their own, on one real machine.

    with Box() as box:
        one, two = box.node("one"), box.node("two")
        two.run(["ping", "-c1", one.address])

A node sees this machine's disk read only, and of /tmp, /var/tmp, /srv, /root and /dev/shm only its own: nodes have no
file in common, unless a folder is mounted at /share on purpose. The Python environment and the checkout are there,
wherever they lie. Nodes reach each other by address or name, and this machine as `box.host`; nothing else.

It needs root on Linux; nothing here knows Ray. Nodes end with the process that made them; what a killed one leaves
behind is removed by the next box, or by

    python tests/cluster/box.py clean
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
INIT = Path(__file__).with_name("node_init.py")
FOLDERS = Path("/tmp")
"""Out of the nodes' sight. Box n has its disks in box-<n> here, the bridge bx<n>, and the n-th /24 of 198.18.0.0/15."""
NETWORKS = 512
OWN = ("/tmp", "/var/tmp", "/srv", "/root")
PACKAGES = {"iproute2": "ip tc", "util-linux": "unshare nsenter pivot_root", "mount": "mount umount"}
"""What is called, by the Debian package that it is in."""
BARE = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
"""The environment of a node's commands."""


@cache
def missing() -> str:
    """What this machine lacks for a box; empty if nothing."""
    if sys.platform != "linux":
        return "a box needs Linux"
    if os.geteuid() != 0:
        return "a box of nodes needs root"
    lacking = [package for package, commands in PACKAGES.items() if not all(map(shutil.which, commands.split()))]
    if lacking:
        return f"apt-get install {' '.join(lacking)}"
    links = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs none /mnt"
    tried = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "sh", "-ec", links]
    done = subprocess.run(tried, capture_output=True, text=True)
    return f"namespaces, bridges or mounts are refused here ({done.stderr.strip()})" if done.returncode else ""


@cache
def cannot_slow() -> str:
    """What this machine lacks for a slow network; empty if nothing."""
    tried = ["unshare", "--net", "sh", "-ec", f"ip link add v0 type veth peer name v1; tc {_bucket('v0', 1_000_000)}"]
    done = subprocess.run(tried, capture_output=True, text=True)
    return f"this kernel has no token bucket (CONFIG_NET_SCH_TBF): {done.stderr.strip()}" if done.returncode else ""


def _bucket(device: str, bytes_per_s: float) -> str:
    # Packets of up to 64 kB are passed on whole between nodes; what is sent at once must hold one.
    burst = max(70_000, int(bytes_per_s / 50))
    return f"qdisc replace dev {device} root tbf rate {int(bytes_per_s)}bps burst {burst} latency 300ms"


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Node:
    """One machine of the box. Its disk lasts until it is dropped: `kill`, then `boot`, is a power cut."""

    def __init__(self, box: Box, name: str, number: int, share: Path | None):
        self.box, self.name, self.share = box, name, share
        self.address = box.address_of(number)
        self.disk = box.folder / name
        """What the node has of its own, seen from outside: its /srv is disk / "srv"."""
        self._link = f"{box.bridge}-{number}"
        self._booted: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pid, self._space = 0, ""
        self.disk.mkdir()

    @property
    def running(self) -> bool:
        return self._booted is not None and self._booted.poll() is None

    def boot(self) -> None:
        """Switches the machine on: its namespaces, its disk, its cable."""
        assert not self.running, f"{self.name} is running"
        own = _outermost([*OWN, tempfile.gettempdir(), Path.home()])
        python = [sys.prefix, Path(sys.prefix).resolve(), sys.base_prefix, Path(sys.executable).resolve().parents[1]]
        of_node = {
            "name": self.name,
            "disk": str(self.disk),
            "own": own,
            "seen": [path for path in _outermost([REPOSITORY, *python]) if _lies_in(path, own)],
            "share": str(self.share.resolve()) if self.share else None,
            "hosts": str(self.box.hosts),
        }
        log = self.disk / "init.log"
        with open(log, "w") as errors:
            self._booted = subprocess.Popen(
                ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--"]
                + [sys.executable, "-IS", str(INIT), json.dumps(of_node)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._booted.stdout is not None
        if self._booted.stdout.readline() != b"ready\n":
            raise OSError(f"node {self.name} did not start: {log.read_text()}")
        (child,) = psutil.Process(self._booted.pid).children()
        self._pid, self._space = child.pid, os.readlink(f"/proc/{child.pid}/ns/pid")
        _do("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        _do("ip", "link", "set", self._link, "master", self.box.bridge, "up")
        to_be = ["link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"]
        for command in (*to_be, f"route add default via {self.box.host}"):  # leads nowhere, but a machine has one
            _do("nsenter", "-t", str(self._pid), "-n", "--", "ip", *command.split())

    def popen(
        self, argv: Sequence[object], env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command on the node, in /root, with this environment beside the barest; what it says is appended to
        a file of this machine. `end` ends it: a signal to what is returned would not reach it.
        """
        with open(log or os.devnull, "ab") as out:
            process = subprocess.Popen(
                self._inside(argv),
                env=BARE | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes = [*(p for p in self._processes if p.poll() is None), process]
        return process

    def run(
        self, argv: Sequence[object], env: Mapping[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the node and keeps what it says, as for `popen`."""
        env = BARE | dict(env or {})
        return subprocess.run(self._inside(argv), env=env, text=True, capture_output=True, timeout=timeout)

    def _inside(self, argv: Sequence[object]) -> list[str]:
        assert self.running, f"{self.name} is not running"
        enter = ["nsenter", "-t", str(self._pid), "--net", "--mount", "--pid", "--uts", "--ipc", "--"]
        return [*enter, "env", "--chdir=/root", f"BOX={self.disk}", *map(str, argv)]

    def end(self, process: subprocess.Popen[bytes]) -> int:
        """SIGKILL for a command and what it started in its session."""
        with suppress(ProcessLookupError):  # which says that the last of them has gone
            while True:
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.01)
        return process.wait(60)

    def cut(self) -> None:
        """Pulls the cable: what is sent to the node or by it is lost, and connections hang."""
        _do("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        _do("ip", "link", "set", self._link, "up")

    def slow(self, bytes_per_s: float | None) -> None:
        """How much the cable carries, in either direction; None: all that this machine can."""
        for prefix, device in (((), self._link), (("nsenter", "-t", str(self._pid), "-n", "--"), "eth0")):
            if bytes_per_s is None:
                _do(*prefix, *f"tc qdisc del dev {device} root".split())
            else:
                _do(*prefix, "tc", *_bucket(device, bytes_per_s).split())

    def pids(self) -> list[int]:
        """Its processes, as this machine counts them; without the node's own first one."""
        found = []
        for entry in os.listdir("/proc"):
            with suppress(OSError):  # it has ended
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") == self._space:
                    found.append(int(entry))
        return [pid for pid in found if pid != self._pid]

    def stop(self) -> None:
        """The machine stands still, with its connections open."""
        stopped: set[int] = set()
        while new := set(self.pids()) - stopped:  # what one started before it was stopped comes in the next round
            for pid in new:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= new

    def cont(self) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for process in self._processes:  # what waits for a command stops along with it
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """The power goes: every process at once, and nobody is told."""
        if self._booted is None:
            return
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._booted.pid).children():
                child.kill()
        for process in self._processes:  # one that stands still would not take note that its command has ended
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        for process in (self._booted, *self._processes):
            process.wait(120)
        self._booted.__exit__(None, None, None)  # closes its pipes
        _unlink(self._link)  # it goes by itself, a moment later
        self._booted, self._processes = None, []

    def drop(self) -> None:
        """For good, with its disk."""
        self.kill()
        del self.box.nodes[self.name]
        self.box.name_all()
        shutil.rmtree(self.disk)


class Box:
    """A network of nodes; leaving it ends and removes all of them."""

    def __enter__(self) -> Box:
        if lacking := missing():
            raise OSError(lacking)
        clean()
        self._number = _claim(Path(tempfile.mkdtemp(prefix="new-box-", dir=FOLDERS)))
        self.folder, self.bridge = FOLDERS / f"box-{self._number}", f"bx{self._number}"
        self.hosts = self.folder / "hosts"
        self.nodes: dict[str, Node] = {}
        self._last = 0
        self.host = self.address_of(254)
        self.name_all()
        _do("ip", "addr", "add", f"{self.host}/24", "dev", self.bridge)
        _do("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for node in self.nodes.values():
                node.kill()
        finally:
            _remove(self.folder)

    def address_of(self, number: int) -> str:
        high, low = divmod(self._number, 256)
        return f"198.{18 + high}.{low}.{number}"

    def node(self, name: str, share: Path | None = None) -> Node:
        """A further machine, switched on. share: a folder of this machine that it has at /share."""
        assert name not in self.nodes and self._last < 253, name
        self._last += 1
        node = Node(self, name, self._last, share)
        self.nodes[name] = node
        self.name_all()
        node.boot()
        return node

    def name_all(self) -> None:
        names = [("127.0.0.1", "localhost"), (self.host, "host")]
        names += [(node.address, node.name) for node in self.nodes.values()]
        self.hosts.write_text("".join(f"{address} {name}\n" for address, name in names))


def _lies_in(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _outermost(folders: Iterable[object]) -> list[str]:
    paths = {str(folder) for folder in folders}
    return sorted(path for path in paths if not _lies_in(path, paths - {path}))


def _claim(made: Path) -> int:
    """Makes this the folder of the first box that nobody has, and its bridge."""
    (made / "owner").write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    for number in range(NETWORKS):
        number = (number + os.getpid()) % NETWORKS
        try:
            made.rename(FOLDERS / f"box-{number}")  # fails where one lies, since none is empty
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                continue
            raise
        if not subprocess.run(["ip", "link", "add", f"bx{number}", "type", "bridge"], capture_output=True).returncode:
            return number
        (FOLDERS / f"box-{number}").rename(made)  # somebody else's bridge
    shutil.rmtree(made)
    raise OSError(f"all {NETWORKS} networks for boxes are taken")


def _unlink(link: str) -> None:
    subprocess.run(["ip", "link", "del", link], capture_output=True)


def _remove(folder: Path) -> None:
    bridge = folder.name.replace("box-", "bx")
    for link in (*Path("/sys/class/net").glob(f"{bridge}-*"), Path(bridge)):
        _unlink(link.name)
    for _ in range(50):  # a node that has just ended may still be writing
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(folder)


def clean() -> list[str]:
    """Removes the boxes whose process has gone, and says which; their nodes ended with it."""
    removed = []
    for owner in FOLDERS.glob("box-*/owner"):
        with suppress(FileNotFoundError):  # another process cleans, too
            pid, began = owner.read_text().split()
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(int(pid)).create_time() == float(began):
                    continue
            for process in psutil.process_iter(["cmdline"]):  # what stood still did not see that it is alone
                if any(word.startswith(f"BOX={owner.parent}/") for word in process.info["cmdline"] or []):
                    process.kill()
            _remove(owner.parent)
            removed.append(owner.parent.name)
    return removed


if __name__ == "__main__":
    if sys.argv[1:] != ["clean"]:
        sys.exit("usage: python tests/cluster/box.py clean")
    print("removed:", *(clean() or ["nothing"]))
