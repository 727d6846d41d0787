"""Files that are there whole or not at all. Below every layer; imports `causes` alone of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmsae_ray.causes import causes

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


def _name(error: BaseException, path: Path) -> None:
    """Say of an OSError, and of those behind an error, which file they are about."""
    for link in causes(error, contexts=True):
        if isinstance(link, OSError) and link.errno is not None and link.filename is None:
            link.filename = str(path)


def replace(temporary: Path, path: Path) -> None:
    """Give a finished file its name, so that content and name outlast a power cut."""
    _flush(temporary)
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
