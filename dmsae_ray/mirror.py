"""An output folder at a URL: a folder on each machine's own disk stands for it, and no disk is shared.

The place at the URL is the truth. A file is sent there before it gets its name here (files.replacing), so a machine
that is lost takes nothing along, and what is here is never ahead. Small files that others wrote are taken over when a
command, a worker or the loop around the chains looks (`refresh`); large ones (SAEs, checkpoints, token sequences,
models) when they are read (`files.present`). A file here carries the time that its content has there: with its size
that tells whether it is still the same. (S3 tells times in seconds: what two machines write within one, of the same
size, is not told apart. No file of ours is written by two machines so soon: a chain that moves starts a process first.)

Several processes of a machine share the folder. Shards of activations are not in it: they are read and written at the
URL itself (store.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmsae_ray.files import TEMPORARY, stand_for, temporary_name
from dmsae_ray.ownership import STANDS_FOR, is_ours
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.store import Missing, Stamp, Store

PATIENT = 40
"""How often whoever works on the output asks a server before what it holds up fails: with the waits between, for over
eight minutes.
"""
TOGETHER = 16
"""Files fetched at the same time."""
LARGE = re.compile(
    r".*/(sae\.safetensors|checkpoint\.pt)|.*/(shards|attribution)/.*|(tokens|models)/.*|data/\w+/tokens/.*"
)
"""What is fetched only when it is read."""
DRIVERS = re.compile(r"mlflow\.db.*|mlartifacts/.*")
"""What only the driver writes, past `files`: sent at its end."""
HERE_ALONE = re.compile(r"(ray|logs)(/.*)?|driver\.lock|claim|generation|probe\.json|stands_for|.*/writer")
"""What is never taken over: it belongs to this machine, or is always read there."""
MODELS = "models/"
"""What is never deleted here because it is not there: its names stand for its content, and it may be on its way."""
CLOCK_NS = 50_000_000
"""By how much the clock of file times may be behind."""


def folder_for(url: SecretUrl, scratch: Path) -> Path:
    """The folder in `scratch` that stands for an output at this URL, the same on every machine."""
    # Without its secrets, which change; but what stands before an @ alone may be a container.
    place = re.sub(r"://([^:/?#]*):[^/]*@", r"://\1@", url.reveal().partition("?")[0])
    name = hashlib.sha256(f"{place}?{str(url).partition('?')[2]}".encode()).hexdigest()[:12]
    return scratch / f"dmsae_ray-{name}"


def mirror_of(url: SecretUrl, folder: Path) -> Mirror:
    """The process's mirror of an output, made where there is none yet.

    Raises ValueError if pyarrow cannot open the URL, or the folder cannot be made or is another user's.
    """
    if (known := _mirrors.get(folder)) is None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be made ({error.strerror}), which is to stand for the output at {url.place}; give "
                "--cluster.scratch a folder on every machine's own disk"
            ) from error
        if folder.lstat().st_uid != os.getuid():
            raise ValueError(
                f"{folder}: belongs to another user, and is to stand for the output at {url.place}; give "
                "--cluster.scratch a folder of your own"
            )
        known = _mirrors[folder] = Mirror(url, folder)
        (folder / STANDS_FOR).write_text(f"{url}\n")
        stand_for(known)
    return known


_mirrors: dict[Path, Mirror] = {}


class Mirror:
    """One output at a URL, and the folder here that stands for it. See files.Elsewhere for what its parts do."""

    def __init__(self, url: SecretUrl, folder: Path):
        self.url, self.folder, self.store = url, folder, Store(url)
        self._guards: dict[Path, Callable[[], None]] = {}

    def __reduce__(self):
        return mirror_of, (self.url, self.folder)

    def patient(self) -> None:
        self.store.attempts = PATIENT

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _path(self, name: str) -> Path:
        return self.folder / name

    # -- writing -------------------------------------------------------------------------------------------------------

    def send(self, file: Path, path: Path) -> None:
        """See files.Elsewhere. Raises StoreError, and what the guard of the path raises."""
        stamp = self.store.send(self._name(path), file, self._guard_of(path))
        os.utime(file, ns=(stamp.mtime_ns, stamp.mtime_ns))

    def discard(self, path: Path) -> None:
        self.store.delete(self._name(path))

    def guard(self, folder: Path, check: Callable[[], None]) -> None:
        self._guards[folder] = check

    def _guard_of(self, path: Path) -> Callable[[], None]:
        return next((self._guards[folder] for folder in path.parents if folder in self._guards), lambda: None)

    def unsent(self, folder: Path) -> list[Path]:
        """Raises StoreError."""
        if not folder.is_dir():
            return [folder] if folder.is_file() and self.store.stamp(self._name(folder)) != _stamp_of(folder) else []
        there = self._stamps(folder)
        return sorted(path for path in self._here(folder) if there.get(self._name(path)) != _stamp_of(path))

    # -- reading -------------------------------------------------------------------------------------------------------

    def current(self, path: Path) -> str:
        """Raises FileNotFoundError or StoreError."""
        try:
            return self.store.read(self._name(path)).decode()
        except Missing as error:
            raise FileNotFoundError(str(error)) from error

    def there(self, path: Path) -> bool:
        """Raises StoreError."""
        return self.store.stamp(self._name(path)) is not None

    def names(self, folder: Path) -> list[str]:
        return sorted(self._stamps(folder))

    def bytes_below(self, folder: Path) -> int:
        """Raises StoreError."""
        one = self.store.stamp(self._name(folder))
        return one.bytes if one is not None else sum(stamp.bytes for stamp in self._stamps(folder).values())

    def fetch(self, path: Path) -> bool:
        """Raises StoreError."""
        if path.exists():
            return True
        stamp = self.store.stamp(self._name(path))
        return stamp is not None and self._take(path, stamp)

    def _take(self, path: Path, stamp: Stamp) -> bool:
        """Whether it is still there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            self.store.fetch(self._name(path), temporary)
            if temporary.stat().st_size != stamp.bytes:  # written anew since: the next look takes that over
                stamp = Stamp(stamp.bytes, 0)
            os.utime(temporary, ns=(stamp.mtime_ns, stamp.mtime_ns))
            os.replace(temporary, path)
        except Missing:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def refresh(self, folder: Path, alone: bool = False) -> None:
        """Raises StoreError."""
        began = time.time_ns() - CLOCK_NS

        def counts(name: str) -> bool:
            return not HERE_ALONE.fullmatch(name) and (alone or not DRIVERS.fullmatch(name))

        there = {name: stamp for name, stamp in self._stamps(folder).items() if is_ours(name) and counts(name)}
        for name in there:  # also where the file itself waits, so that its folder is seen
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
        stale = {}
        for path in self._here(folder):
            name = self._name(path)
            try:
                about = path.lstat()
            except FileNotFoundError:
                continue  # another process of this machine deleted it
            same = there.get(name) == Stamp(about.st_size, about.st_mtime_ns)
            # What this machine's other processes have changed meanwhile is newer than what was listed.
            if not same and about.st_ctime_ns < began and counts(name):
                stale[name] = path
        for name, path in stale.items():
            kept = name not in there and (name.startswith(MODELS) or DRIVERS.fullmatch(name))
            if not kept and (name not in there or LARGE.fullmatch(name)):
                path.unlink(missing_ok=True)
        wanted = [
            name for name in there if not LARGE.fullmatch(name) and (name in stale or not self._path(name).exists())
        ]
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(lambda name: self._take(self._path(name), there[name]), wanted))

    def _stamps(self, folder: Path) -> dict[str, Stamp]:
        return self.store.stamps(None if folder == self.folder else self._name(folder))

    def _here(self, folder: Path) -> Iterator[Path]:
        """Files here below a folder; none of a writer at work, nor a link."""
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not re.search(f"{TEMPORARY}$", name)]
            for name in names:
                if not re.search(f"{TEMPORARY}$", name) and not Path(place, name).is_symlink():
                    yield Path(place, name)


def _stamp_of(path: Path) -> Stamp:
    about = path.stat()
    return Stamp(about.st_size, about.st_mtime_ns)
