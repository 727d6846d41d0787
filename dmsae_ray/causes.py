"""What lies behind an error that came through Ray."""

from __future__ import annotations

import errno
import re

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What a disk refuses with on which there is no room, or that must not be written to."""
DISK = FULL | {errno.EIO, errno.ESTALE}
"""What a disk refuses with, or a server of files."""
IN_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "database or disk is full": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "Stale file handle": errno.ESTALE,
}
"""The same in the words of libraries that raise errors of their own, and of errors that came through Ray as text."""
IN_TEXT = re.compile(rf"({'|'.join(IN_WORDS)})(: '[^']+')?")


def causes(error: BaseException | None, contexts: bool = False) -> list[BaseException]:
    """The error and what caused it, one after the other, also where Ray wrapped what a task or an actor raised.

    error: None, as `sys.exc_info` gives it where none is handled, has no causes.
    contexts: errors that were being handled when another was raised count as causes, too.
    """
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = getattr(link, "cause", None) or link.__cause__ or (link.__context__ if contexts else None)
    return found


def disk_trouble(error: BaseException) -> str | None:
    """One line with the remedy if a disk that is full, read-only or gone is behind an error; None otherwise."""
    return _trouble(error, DISK)


def disk_full(error: BaseException) -> str | None:
    """The same of a full or read-only disk alone, which trying again at once cannot mend."""
    return _trouble(error, FULL)


def _trouble(error: BaseException, kinds: set[int]) -> str | None:
    for link in causes(error, contexts=True):
        if isinstance(link, OSError) and link.errno in kinds:
            where = f"{link.filename}: " if link.filename else ""
            return f"{where}{link.strerror}; {REMEDY}"
        if (found := IN_TEXT.search(str(link))) and IN_WORDS[found[1]] in kinds:
            return f"{found[2][3:-1] + ': ' if found[2] else ''}{found[1]}; {REMEDY}"
    return None


REMEDY = (
    "free space there, or give --output a larger disk that can be written; the same command continues, what is "
    "finished is kept"
)
