"""Token sequences: BOS first, padding right. N sequences, T context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dmsae_ray.corpus.token_file import TokenFileWriter, map_arrays, read_metadata


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of tokens of one or more documents, as packing.py cuts them."""

    ids: np.ndarray
    """int32 [N, T]; a BOS inside a sequence starts another document"""
    lengths: np.ndarray
    """int32 [N], real tokens of a sequence, every BOS included"""
    rows: np.ndarray
    """int32 [N], tokens of a sequence that can become activations, and targets: the real ones that are not BOS"""
    ends: bool = True
    """whether there are no more of them: false of the first part of a corpus"""

    def __post_init__(self) -> None:
        assert self.ids.ndim == 2 and self.ids.dtype == np.int32, (self.ids.shape, self.ids.dtype)
        assert self.lengths.shape == self.rows.shape == (len(self.ids),)
        assert self.lengths.dtype == self.rows.dtype == np.int32

    @property
    def tokens(self) -> int:
        """Tokens that can become rows: BOS and padding do not count."""
        return int(self.rows.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, order: np.ndarray) -> TokenSequences:
        """The sequences at these indices, in this order."""
        return TokenSequences(self.ids[order], self.lengths[order], self.rows[order])

    def first_tokens(self, tokens: int) -> TokenSequences:
        """The shortest run of first sequences with at least so many tokens; all of them if there are fewer."""
        reached = np.cumsum(self.rows, dtype=np.int64) >= tokens
        last = int(reached.argmax()) + 1 if reached.any() else len(self)
        return TokenSequences(self.ids[:last], self.lengths[:last], self.rows[:last])

    def batches(self, sequences: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (ids [B, T], lengths [B]) as int64 tensors, always of B = `sequences` rows.

        The last batch is filled with rows of length 1 (BOS and padding), which have neither rows nor targets: the shape
        of the computation, and with it every rounding, does not depend on where a batch stands.
        """
        for first in range(0, len(self), sequences):
            ids = self.ids[first : first + sequences]
            lengths = self.lengths[first : first + sequences]
            missing = sequences - len(ids)
            if missing:
                # Copies of a real row, so that nothing unusual is computed at positions that never count.
                ids = np.concatenate([ids, np.repeat(ids[-1:], missing, axis=0)])
                lengths = np.concatenate([lengths, np.ones(missing, np.int32)])
            yield torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with TokenFileWriter(path, self.ids.shape[1], metadata or {}) as file:
            self.append_to(file)
            file.finish(metadata or {})

    def append_to(self, file: TokenFileWriter) -> None:
        """Write these sequences after those that the file has."""
        file.extend(self.ids, self.lengths, self.rows)

    @staticmethod
    def load(path: Path) -> TokenSequences:
        """Map what was written, read-only. Raises ValueError naming the file if it is damaged or of another format."""
        return TokenSequences(**map_arrays(path), ends=read_metadata(path).get("ends") != "false")

    @staticmethod
    def empty(context: int) -> TokenSequences:
        """No sequences."""
        none = np.empty(0, dtype=np.int32)
        return TokenSequences(none.reshape(0, context), none, none)


def pad_id_of(tokenizer) -> int:
    """The id that fills up rows: the tokenizer's own, or another special one, since padding is never looked at."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
