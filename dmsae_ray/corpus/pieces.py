"""Pieces: a long document cut at the ends of paragraphs, so that one book is many documents."""

from __future__ import annotations

import re
from collections.abc import Iterator

BOOK = 50_000
"""Characters of a text file from which on it is taken for a book, unless corpus.piece_characters says something else.
"""
PIECE = 2000
"""Characters of a piece of a book, at most: some 500 tokens. Small enough that a book of 200 000 characters has a
hundred, of which each held-out split, 5 % of them, gets some."""
ENDS = tuple(re.compile(pattern) for pattern in (r"\n[ \t\r]*\n\s*", r"\n", r"[.!?][\"'”’)]*\s+", r"\s+"))
"""Where a text is cut, best first: after a paragraph, a line, a sentence, a word."""


def pieces_of(text: str, characters: int) -> Iterator[str]:
    """Yield pieces of at most so many characters that joined are the text.

    Each is cut at the last end of a paragraph in it; where there is none in its second half, at that of a line, a
    sentence, a word.
    """
    start = 0
    while len(text) - start > characters:
        end = _end(text, start, start + characters)
        yield text[start:end]
        start = end
    yield text[start:]


def _end(text: str, start: int, limit: int) -> int:
    half = start + (limit - start) // 2
    for pattern in ENDS:
        if found := list(pattern.finditer(text, half, limit)):
            return found[-1].end()
    return limit
