"""Packing: how documents' tokens are cut into sequences. Every sequence starts with BOS.

Letters: n tokens of a document, N sequences, T context, S = T-1 tokens of a sequence after its BOS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from dmsae_ray.corpus.tokens import TokenSequences

MIN_PIECE = 16
"""Shorter ends are dropped: they would be mostly padding, and their first tokens have hardly any context."""


class Packing(Protocol):
    """A way to cut: documents go in one after the other, sequences come out."""

    shortest: int
    """tokens of a document, or of its last sequence, below which they are dropped"""

    def kept(self, n: int) -> int:
        """How many of a document's n tokens get into sequences."""

    def add(self, ids_n: np.ndarray) -> TokenSequences:
        """The sequences that this document completes. ids_n: its tokens, int32."""

    def rest(self) -> TokenSequences:
        """What is left when all documents are added."""


class Separate:
    """A sequence holds tokens of one document, and is padded where they do not fill it."""

    def __init__(self, context: int, bos: int, pad: int):
        self.context, self.bos, self.pad = context, bos, pad
        self.shortest = min(MIN_PIECE, context - 1)

    def kept(self, n: int) -> int:
        """How many of a document's n tokens get into sequences."""
        end = n % (self.context - 1)
        return n - end if end < self.shortest else n

    def add(self, ids_n: np.ndarray) -> TokenSequences:
        """The sequences of one document."""
        ids_n = ids_n[: self.kept(len(ids_n))]
        body = self.context - 1
        count = -(-len(ids_n) // body)
        padded = np.full(count * body, self.pad, dtype=np.int32)
        padded[: len(ids_n)] = ids_n
        ids_NT = np.empty((count, self.context), dtype=np.int32)
        ids_NT[:, 0] = self.bos
        ids_NT[:, 1:] = padded.reshape(count, body)
        rows_N = np.minimum(body, len(ids_n) - body * np.arange(count)).astype(np.int32)
        return TokenSequences(ids_NT, rows_N + 1, rows_N)

    def rest(self) -> TokenSequences:
        """What is left when all documents are added: nothing, each was finished on its own."""
        return TokenSequences.empty(self.context)


class Concatenate:
    """Documents are joined, a BOS before each, and cut at the context: no padding, except in the very last sequence.

    A document that goes on in the next sequence has a BOS there too. A BOS inside a sequence therefore marks the start
    of a document, and is no row: nothing predicts it and its residual stream says nothing about text.
    """

    def __init__(self, context: int, bos: int, pad: int):
        self.context, self.bos, self.pad = context, bos, pad
        self.shortest = min(MIN_PIECE, context - 1)
        self._open = np.empty(0, dtype=np.int32)  # the sequence that is being filled

    def kept(self, n: int) -> int:
        """How many of a document's n tokens get into sequences (not counting the end of the very last one)."""
        return n

    def add(self, ids_n: np.ndarray) -> TokenSequences:
        """The sequences that this document completes."""
        if not len(ids_n):
            return TokenSequences.empty(self.context)
        joined = np.concatenate([self._open, [self.bos], ids_n]).astype(np.int32)
        # The first sequence has its BOS already, be it this document's or that of the one before it; the others get
        # theirs.
        body = self.context - 1
        count, end = divmod(len(joined) - 1, body)
        ids_NT = np.full((count, self.context), self.bos, dtype=np.int32)
        ids_NT[:, 1:] = joined[1 : 1 + count * body].reshape(count, body)
        left = joined[len(joined) - end :]
        self._open = np.concatenate([[self.bos], left]).astype(np.int32) if end else left
        return TokenSequences(
            ids_NT, np.full(count, self.context, dtype=np.int32), (ids_NT != self.bos).sum(axis=1, dtype=np.int32)
        )

    def rest(self) -> TokenSequences:
        """The incomplete last sequence, padded; none if it is shorter than MIN_PIECE."""
        length = len(self._open)
        if length - 1 < self.shortest:
            return TokenSequences.empty(self.context)
        ids_NT = np.full((1, self.context), self.pad, dtype=np.int32)
        ids_NT[0, :length] = self._open
        rows = np.count_nonzero(self._open != self.bos)
        return TokenSequences(ids_NT, np.array([length], dtype=np.int32), np.array([rows], dtype=np.int32))


PACKINGS: dict[str, Callable[[int, int, int], Packing]] = {"separate": Separate, "concatenate": Concatenate}
"""By the name that corpus.packing gives them; made from context, BOS and padding token."""
