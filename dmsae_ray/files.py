"""Files that are there whole or not at all. Below every layer; imports `causes` alone of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dmsae_ray.causes import causes

if TYPE_CHECKING:
    from dmsae_ray.secret_url import SecretUrl

TEMPORARY = r"\.tmp-\d+-[0-9a-f]{6}"
"""How `temporary_name` ends a name, as a pattern."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what was written there becomes `path` when the block ends, and goes if it
    raises. An OSError then says which file it is about, which that of a disk that fills up does not by itself.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        replace(temporary, path)
    except Exception as error:
        _name(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Elsewhere(Protocol):
    """What a folder of this machine stands for: a place elsewhere, which alone is the truth (see mirror.py).

    A file is there before it is here, so what is here is there too, unless others have changed it since.
    """

    folder: Path
    url: SecretUrl

    def patient(self) -> None:
        """From now on wait for a server that is away for minutes, where a command that only looks gives up soon."""

    def there(self, path: Path) -> bool:
        """Whether a file is there, whatever is here."""

    def unsent(self, folder: Path) -> list[Path]:
        """Files here, of a folder or this one, that there are not the same."""

    def send(self, file: Path, path: Path) -> None:
        """Make the content of `file` that of `path` there, and the times of `file` those it has there."""

    def fetch(self, path: Path) -> bool:
        """Have a file here, if it is here or there."""

    def refresh(self, folder: Path, alone: bool = False) -> None:
        """Take over what others have changed, added or removed below a folder. Large files wait for `fetch`.

        alone: the caller holds the output, so that what only its driver writes is not in use now.
        """

    def discard(self, path: Path) -> None:
        """Delete a file there."""

    def bytes_below(self, folder: Path) -> int:
        """Of all files there below a folder, or of this file."""

    def names(self, folder: Path) -> list[str]:
        """Of every file there below a folder, whosever it is: seen from the place's own folder."""

    def current(self, path: Path) -> str:
        """A small file's text as it is there now. Raises FileNotFoundError, another OSError or ValueError."""

    def guard(self, folder: Path, check: Callable[[], None]) -> None:
        """Call `check` before a write below this folder that failed is tried again; it raises if that may not be."""


_elsewhere: dict[Path, Elsewhere] = {}
"""By the folder that stands for it."""


def stand_for(place: Elsewhere) -> None:
    """From now on, in this process, `place.folder` stands for a place elsewhere."""
    _elsewhere[place.folder] = place


def elsewhere(path: Path) -> Elsewhere | None:
    """The place that a path's folder stands for; None: it is what it seems to be."""
    return next((place for folder, place in _elsewhere.items() if path.is_relative_to(folder)), None)


def present(path: Path) -> bool:
    """Whether a file is there; where its folder stands for a place elsewhere, it is fetched from there first.

    Raises ValueError if that place cannot be reached.
    """
    return path.exists() or ((place := elsewhere(path)) is not None and place.fetch(path))


def refresh(folder: Path, alone: bool = False) -> None:
    """Make what is below a folder what others have left there, which in a folder of this machine it always is. alone:
    as in `Elsewhere`.
    """
    if (place := elsewhere(folder)) is not None:
        place.refresh(folder, alone)


def publish(path: Path) -> None:
    """Send a file that was written past `replacing`, in place or by a library, and all files of a folder."""
    if (place := elsewhere(path)) is not None:
        for file in place.unsent(path):
            place.send(file, file)


def present_below(folder: Path, named: str = "") -> None:
    """Fetch every file below a folder, or those of this name, the large ones too."""
    if (place := elsewhere(folder)) is not None:
        for name in place.names(folder):
            if name.endswith(named):
                place.fetch(place.folder / name)


def be_patient(folder: Path) -> None:
    """As `Elsewhere.patient`; for who works on an output, not for who looks."""
    if (place := elsewhere(folder)) is not None:
        place.patient()


def discard(path: Path) -> None:
    """Delete a file, here and wherever else it is. What is not there is no error."""
    if (place := elsewhere(path)) is not None:
        place.discard(path)
    path.unlink(missing_ok=True)


def move(path: Path, to: Path) -> None:
    """Give a file another name."""
    if (place := elsewhere(path)) is not None:
        place.send(path, to)
        place.discard(path)
    path.replace(to)


def current(path: Path) -> str:
    """A small file's text as it is now, wherever its truth is. Raises FileNotFoundError if there is none, another
    OSError or ValueError if it cannot be read.
    """
    place = elsewhere(path)
    return path.read_text() if place is None else place.current(path)


def guard(folder: Path, check: Callable[[], None]) -> None:
    """What to ask before a write below a folder that was held up by a server is tried again."""
    if (place := elsewhere(folder)) is not None:
        place.guard(folder, check)


def _name(error: BaseException, path: Path) -> None:
    """Say of an OSError, and of those behind an error, which file they are about."""
    for link in causes(error, contexts=True):
        if isinstance(link, OSError) and link.errno is not None and link.filename is None:
            link.filename = str(path)


def replace(temporary: Path, path: Path) -> None:
    """Give a finished file its name, so that content and name outlast a power cut."""
    _flush(temporary)
    if (place := elsewhere(path)) is not None:
        place.send(temporary, path)
    os.replace(temporary, path)
    _flush(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses, on this machine or another, and that `remove_leftovers` knows."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leftovers(folder: Path) -> list[Path]:
    """Files under a temporary name of ours anywhere below a folder, itself no link; links are not followed."""
    if folder.is_symlink():
        return []
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if re.search(TEMPORARY + "$", path.name) and not path.is_symlink())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left under temporary names; only for a folder that is ours, and that nobody else
    writes to now.
    """
    for path in leftovers(folder):
        path.unlink(missing_ok=True)
