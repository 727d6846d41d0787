"""A container of our image on a node of a box.

It has the image's files, a layer of its own to write on, devices, /proc and /dev/shm of its own, and the image's user
without any right.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.box import Box, Node

from image.built import Image

ROOT = "/srv/root"
"""The container's root on the node."""
MAKE = """
mkdir -p /srv/upper /srv/work {root}
mount -t overlay overlay -o lowerdir=/share,upperdir=/srv/upper,workdir=/srv/work {root}
mount -t proc proc {root}/proc
mount --rbind /sys {root}/sys
mount -t tmpfs -o mode=755 dev {root}/dev
for name in null zero full random urandom; do touch {root}/dev/$name; mount --bind /dev/$name {root}/dev/$name; done
ln -s /proc/self/fd {root}/dev/fd
mkdir {root}/dev/shm
mount -t tmpfs -o mode=1777,size={shm} shm {root}/dev/shm
mount --bind /etc/hosts {root}/etc/hosts
touch {root}/etc/resolv.conf
mount --bind /etc/resolv.conf {root}/etc/resolv.conf
"""


class Container:
    """On a new node of this name. files: where it sees a file, and the file; volumes: the same of folders by name, each
    with what the image has in its place as owner; they lie on the node's disk.
    """

    def __init__(
        self,
        box: Box,
        name: str,
        image: Image,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, Path] | None = None,
        volumes: Mapping[str, str] | None = None,
        shm_bytes: int = 1 << 30,
    ):
        self.name, self.image = name, image
        self.node: Node = box.node(name, share=image.root)
        self.environment = image.env | {"HOME": image.folder} | dict(environment or {})
        self.log = self.node.disk / "container.log"
        self._as_root(MAKE.format(root=ROOT, shm=shm_bytes))
        for number, (target, source) in enumerate((files or {}).items()):
            copy = self.node.disk / "srv" / "files" / str(number)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)  # with its mode
            self.show(Path(f"/srv/files/{number}"), target)
        for volume, target in (volumes or {}).items():
            at, own = shlex.quote(f"{ROOT}{target}"), f"/srv/volumes/{volume}"
            self._as_root(f"mkdir -p {own} {at}; chown --reference={at} {own}; mount --bind {own} {at}")

    def show(self, path: Path, target: str) -> None:
        """A file or folder that the node sees, to be read in the container at this place."""
        at, source = shlex.quote(f"{ROOT}{target}"), shlex.quote(str(path))
        self._as_root(f"mkdir -p $(dirname {at}); if test -d {source}; then mkdir -p {at}; else touch {at}; fi")
        self._as_root(f"mount --bind {source} {at}; mount -o remount,bind,ro {at}")

    def _as_root(self, script: str) -> None:
        done = self.node.run(["sh", "-ec", script])
        assert done.returncode == 0, f"{self.name}: {script}{done.stderr}"

    def _argv(self, argv: Sequence[object]) -> list[object]:
        who = [f"--reuid={self.image.user}", f"--regid={self.image.group}", "--clear-groups"]
        drop = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        env = [f"{key}={value}" for key, value in self.environment.items()]
        start = ["env", "--ignore-environment", f"--chdir={self.image.folder}", *env]
        return ["chroot", ROOT, "setpriv", *who, *drop, *start, *argv]

    def start(self, argv: Sequence[object]) -> subprocess.Popen[bytes]:
        """Its command; what it says goes to `log`."""
        return self.node.popen(self._argv(argv), log=self.log)

    def run(self, argv: Sequence[object], timeout: float = 3600) -> subprocess.CompletedProcess[str]:
        """A command beside the first one, as `docker compose exec`."""
        return self.node.run(self._argv(argv), timeout=timeout)
