"""Where files lie: a folder, or any URL that pyarrow's file systems know (`s3://`, `gs://`, `hdfs://`).

A URL may carry its options, such as `s3://bucket/prefix?endpoint_override=http://host:9000&region=us-east-1`;
credentials come from the environment, as the vendors' own tools take them. Imports pyarrow alone: every Ray Data
process that reads would pay seconds for torch.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from dmsae_ray.causes import disk_full
from dmsae_ray.files import replacing
from dmsae_ray.held_up import REQUESTS
from dmsae_ray.secret_url import SecretUrl, scrub

ATTEMPTS, FIRST_WAIT_S = 7, 0.25
"""A server's refusal is asked again so often, after 0.25, 0.5, ... 8 seconds: over 15 s, on top of the client library's
own tries.
"""
LONGEST_WAIT_S = 15.0
IN_VAIN = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
"""In what S3 answers to a request that no further attempt will mend."""
PIECE = 8 << 20
"""Bytes of a file that are in memory at once while it is sent or fetched."""
POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux
T = TypeVar("T")


class StoreError(ValueError):
    """A file that cannot be read or written. The message names it and the remedy."""


class Missing(StoreError):
    """A file that is not there."""


@dataclass(frozen=True)
class Stamp:
    """What tells one content of a remote file from another."""

    bytes: int
    mtime_ns: int
    """as the server has it"""


class Store:
    """A folder of files. Names are relative, with `/`; a write is whole or not at all."""

    def __init__(self, url: str | Path | SecretUrl, attempts: int = ATTEMPTS):
        """attempts: how often a remote server is asked before it is given up.

        Raises StoreError if the URL is none that pyarrow can open. Touches no file.
        """
        self.attempts = attempts
        self.url = SecretUrl(url if isinstance(url, SecretUrl) else str(url))
        whole = self.url.reveal()
        if "://" in whole and not whole.startswith("file://"):
            self.local = None
            self._base, _, self._query = whole.partition("?")
            self._base = self._base.rstrip("/")
        else:
            self.local = Path(whole.removeprefix("file://")).expanduser().absolute()
            self.url = SecretUrl(str(self.local))
        if self.local is None:
            self._remote()

    def __reduce__(self):
        return Store, (self.url, self.attempts)

    def __str__(self) -> str:
        return str(self.local) if self.local else self.url.place.rstrip("/")

    def child(self, name: str) -> Store:
        """The folder of this name below this one."""
        if self.local:
            return Store(self.local / self._inside(name))
        return Store(f"{self._key(self._base, name)}" + (f"?{self._query}" if self._query else ""), self.attempts)

    def path(self, name: str) -> Path:
        """A file of a local store. Every name is turned into a path here or in `_key`, since names come from manifests
        and records, which others may have written. Raises StoreError if it leads out of the folder, by itself or by a
        link."""
        assert self.local is not None
        path = self.local / self._inside(name)
        try:
            inside = path.resolve().is_relative_to(self.local.resolve())
        except (OSError, RuntimeError):  # links that lead in a circle
            inside = False
        if not inside:
            raise self._outside(name, "by a link leads")
        return path

    def _key(self, prefix: str, name: str) -> str:
        return f"{prefix}/{self._inside(name)}"

    def _inside(self, name: str) -> str:
        parts = name.split("/")
        if not name or "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise self._outside(name, "leads")
        return name

    def _outside(self, name: str, how: str) -> StoreError:
        return StoreError(
            f"{self}: {name!r} {how} out of this folder; it was neither read nor touched. Names of files are relative, "
            "without `..`: mend what names it, or take the link away"
        )

    def where(self, name: str) -> str:
        """A file's full name, for messages; options, name and password, and so secrets of the URL, are left out."""
        return f"{self}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none. Raises StoreError if the server cannot be asked."""
        if self.local:
            try:
                path = self.path(name)
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._refused(name, error) from error
        system, prefix = self._remote()
        info = self._again(name, lambda: system.get_file_info(self._key(prefix, name)))
        return info.size if info.type == fs.FileType.File else None

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files directly in a folder, by name; empty if there is no such folder. One request, however many
        files.
        """
        if self.local:
            try:
                with os.scandir(self.path(folder)) as found:
                    return {f"{folder}/{file.name}": file.stat().st_size for file in found if file.is_file()}
            except FileNotFoundError:
                return {}
            except OSError as error:
                raise self._refused(folder, error) from error
        system, prefix = self._remote()
        infos = self._again(
            folder, lambda: system.get_file_info(fs.FileSelector(self._key(prefix, folder), allow_not_found=True))
        )
        return {f"{folder}/{info.base_name}": info.size for info in infos if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        """A whole file. Raises Missing or StoreError."""
        if self.local:
            try:
                return self.path(name).read_bytes()
            except OSError as error:
                raise self._refused(name, error) from error
        return self._again(name, lambda: self._read_remote(name, None))

    def read_range(self, name: str, offset: int, length: int) -> pa.Buffer:
        """These bytes of a file; fewer if the file ends before. A local file is mapped, not copied.

        Raises Missing or StoreError.
        """
        if self.local is None:
            return pa.py_buffer(self._again(name, lambda: self._read_remote(name, (offset, length))))
        try:
            with open(self.path(name), "rb") as file:
                # Touching a map beyond the file's end would kill the process.
                length = max(0, min(length, os.fstat(file.fileno()).st_size - offset))
                if not length:
                    return pa.py_buffer(b"")
                first = offset - offset % mmap.ALLOCATIONGRANULARITY
                # Populated at once: a fault for every few pages costs as much as hashing them.
                mapped = mmap.mmap(
                    file.fileno(), offset + length - first, mmap.MAP_SHARED | POPULATE, mmap.PROT_READ, offset=first
                )
        except OSError as error:
            raise self._refused(name, error) from error
        return pa.py_buffer(memoryview(mapped)[offset - first :])

    def write(self, name: str, content: bytes | memoryview | pa.Buffer) -> None:
        """Raises StoreError, in words of its own if the disk is full."""
        if self.local:
            path = self.path(name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
            except OSError as error:
                raise self._refused(name, error) from error
            return
        system, prefix = self._remote()

        def send() -> None:
            with system.open_output_stream(self._key(prefix, name)) as stream:
                stream.write(content)

        self._again(name, lambda: _whole(send))
        if self.size(name) != len(memoryview(content)):
            raise StoreError(
                f"{self.where(name)}: the server took the file but has not all of it; run the same command again"
            )

    def delete(self, name: str) -> None:
        """Deleting what is not there is nothing. Raises StoreError."""
        if self.local:
            try:
                self.path(name).unlink(missing_ok=True)
            except OSError as error:
                raise self._refused(name, error) from error
        elif self.size(name) is not None:
            system, prefix = self._remote()
            self._again(name, lambda: system.delete_file(self._key(prefix, name)))

    # -- whole files of a remote place ---------------------------------------------------------------------------------

    def stamp(self, name: str) -> Stamp | None:
        """Of a remote file; None if there is none. Raises StoreError if the server cannot be asked."""
        system, prefix = self._remote()
        return _stamp(self._again(name, lambda: system.get_file_info(self._key(prefix, name))))

    def stamps(self, folder: str | None = None) -> dict[str, Stamp]:
        """Of every remote file below a folder (None: below this place), by name; empty if there is no such folder."""
        system, prefix = self._remote()
        base = prefix if folder is None else self._key(prefix, folder)
        infos = self._again(
            folder or "",
            lambda: system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True)),
        )
        found = ((info.path.removeprefix(prefix).lstrip("/"), _stamp(info)) for info in infos)
        return {name: stamp for name, stamp in found if stamp is not None}

    def send(self, name: str, path: Path, before: Callable[[], None] = lambda: None) -> Stamp:
        """Write a file's content to a remote place, piece by piece. before: called before another attempt.

        Raises StoreError.
        """
        system, prefix = self._remote()

        def act() -> None:
            with open(path, "rb") as file, system.open_output_stream(self._key(prefix, name)) as stream:
                while piece := file.read(PIECE):
                    stream.write(piece)

        self._again(name, lambda: _whole(act), before)
        stamp = self.stamp(name)
        if stamp is None or stamp.bytes != path.stat().st_size:
            raise StoreError(
                f"{self.where(name)}: the server took the file but has not all of it; run the same command again"
            )
        return stamp

    def fetch(self, name: str, path: Path) -> None:
        """Write a remote file's content to a local one, piece by piece. Raises Missing or StoreError."""
        system, prefix = self._remote()

        def act() -> None:
            with system.open_input_stream(self._key(prefix, name)) as stream, open(path, "wb") as file:
                while piece := stream.read(PIECE):
                    file.write(piece)

        self._again(name, act)

    # -- remote --------------------------------------------------------------------------------------------------------

    def _remote(self) -> tuple[fs.FileSystem, str]:
        try:
            return _file_system(self.url.reveal())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            # pyarrow repeats the URL, and with it its secrets: so its error is not shown either.
            why = _first_line(error).replace(self.url.reveal(), str(self))
            raise StoreError(
                f"{self}: not a place that pyarrow can open ({why}); give a folder or an s3:// or gs:// URL"
            ) from None

    def _read_remote(self, name: str, part: tuple[int, int] | None) -> bytes:
        system, prefix = self._remote()
        with system.open_input_file(self._key(prefix, name)) as file:
            return file.read() if part is None else file.read_at(part[1], part[0])

    def _again(self, name: str, act: Callable[[], T], before: Callable[[], None] = lambda: None) -> T:
        """Call until it succeeds. A file that is not there is an answer; a server that cannot be reached or says 503 is
        asked again. before: called before each attempt but the first.
        """
        with ExitStack() as held_up:
            for attempt in range(self.attempts):
                if attempt:
                    if attempt == 1:
                        held_up.enter_context(REQUESTS)
                    time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
                    before()
                try:
                    return act()
                except FileNotFoundError as error:
                    raise self._refused(name, error) from error
                except OSError as error:
                    if disk_full(error) is not None:
                        raise  # of this machine, while a file was fetched
                    if attempt == self.attempts - 1 or any(word in str(error) for word in IN_VAIN):
                        raise StoreError(
                            f"{self.where(name)}: {attempt + 1} attempts failed, the last with: {_first_line(error)}. "
                            "Check the address, the network and the credentials, and run the same command again: what "
                            "is finished is kept"
                        ) from error
        raise AssertionError("unreachable")

    def _refused(self, name: str, error: OSError) -> StoreError:
        if isinstance(error, FileNotFoundError):
            return Missing(f"{self.where(name)}: no such file")
        remedy = "check the path and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = (
                "free space there, or give --output or --harvest.store a larger disk; the same command continues, "
                "what is finished is kept"
            )
        return StoreError(f"{self.where(name)}: {error.strerror or error}; {remedy}")


def _whole(act: Callable[[], T]) -> T:
    """Do it in a thread, which no signal interrupts: an object appears when its upload ends, so a writer that dies
    leaves none, but one that is interrupted would end the upload of what it has sent so far.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def _stamp(info: fs.FileInfo) -> Stamp | None:
    return Stamp(info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


@functools.lru_cache(maxsize=8)
def _file_system(url: str) -> tuple[fs.FileSystem, str]:
    """One connection per process and URL: making one costs as much as many reads."""
    return fs.FileSystem.from_uri(url)


def _first_line(error: Exception) -> str:
    return scrub((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
