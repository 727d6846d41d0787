"""What lies behind an error that came through Ray."""

from __future__ import annotations


def causes(error: BaseException, contexts: bool = False) -> list[BaseException]:
    """The error and what caused it, one after the other, also where Ray wrapped what a task or an actor raised.

    contexts: errors that were being handled when another was raised count as causes, too.
    """
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__ or (error.__context__ if contexts else None)
    return found
