"""Token sequences: BOS and up to T-1 tokens of one document, padded right. N sequences, T context."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmsae_ray.corpus.documents import Document

FORMAT_VERSION = "1"
MIN_PIECE = 16
"""Shorter ends of documents are dropped: they would be mostly padding, and their first tokens have hardly any context."""
ENCODE_DOCUMENTS = 64
"""Documents handed to the tokenizer at a time: bounds memory, keeps its threads busy."""


@dataclass(frozen=True)
class TokenSequences:
    """Rows of BOS, tokens of one document, padding."""

    ids: np.ndarray
    """int32 [N, T]"""
    lengths: np.ndarray
    """int32 [N], real tokens of a row, BOS included"""

    def __post_init__(self) -> None:
        assert self.ids.ndim == 2 and self.ids.dtype == np.int32, (self.ids.shape, self.ids.dtype)
        assert self.lengths.shape == (len(self.ids),) and self.lengths.dtype == np.int32

    @property
    def tokens(self) -> int:
        """Tokens that can become rows: BOS and padding do not count."""
        return int((self.lengths.astype(np.int64) - 1).sum())

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, order: np.ndarray) -> TokenSequences:
        """The sequences at these indices, in this order."""
        return TokenSequences(self.ids[order], self.lengths[order])

    def first_tokens(self, tokens: int) -> TokenSequences:
        """The shortest run of first sequences with at least so many tokens; all of them if there are fewer."""
        reached = np.cumsum(self.lengths.astype(np.int64) - 1) >= tokens
        last = int(reached.argmax()) + 1 if reached.any() else len(self)
        return TokenSequences(self.ids[:last], self.lengths[:last])

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

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        header = {"format_version": FORMAT_VERSION} | {key: str(value) for key, value in (metadata or {}).items()}
        tensors = {"ids": np.ascontiguousarray(self.ids), "lengths": np.ascontiguousarray(self.lengths)}
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> TokenSequences:
        """Read what `save` wrote. Raises ValueError naming the file if it is damaged or of another format."""
        with _open(path) as file:
            return TokenSequences(file.get_tensor("ids"), file.get_tensor("lengths"))


def read_metadata(path: Path) -> dict[str, str]:
    """What was saved beside the sequences. Raises ValueError like `TokenSequences.load`."""
    with _open(path) as file:
        return file.metadata()


def _open(path: Path):
    remedy = "delete it, and the harvest makes it again"
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file of token sequences; harvest first")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged file of token sequences ({error}); {remedy}") from error
    found = (file.metadata() or {}).get("format_version")
    if found != FORMAT_VERSION or set(file.keys()) != {"ids", "lengths"}:
        raise ValueError(f"{path}: token sequences of format {found}, this version reads {FORMAT_VERSION}; {remedy}")
    return file


def pad_id_of(tokenizer) -> int:
    """The id that fills up rows: the tokenizer's own, or another special one, since padding is never looked at."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def tokenise(documents: Iterable[Document], tokenizer, context: int) -> TokenSequences:
    """Cut documents into rows of BOS + up to context-1 tokens of one document each, in order.

    tokenizer: a transformers tokenizer with a BOS token. Pieces under MIN_PIECE tokens are dropped (under context-1 where
    the context is shorter than that). Raises ValueError if the tokenizer has no BOS or nothing is left.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no BOS token, which starts every sequence; use another model")
    pad, body = pad_id_of(tokenizer), context - 1
    shortest = min(MIN_PIECE, body)
    ids, lengths = [], []
    stream = iter(documents)
    while texts := [document.text for document in islice(stream, ENCODE_DOCUMENTS)]:
        # verbose=False: documents are longer than the model's context, and are cut right here. A special token's name
        # in a text is text: the only BOS of a row is its first token.
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        for text_ids in encoded["input_ids"]:
            for start in range(0, len(text_ids), body):
                piece = text_ids[start : start + body]
                if len(piece) < shortest:
                    continue
                row = np.full(context, pad, dtype=np.int32)
                row[0] = tokenizer.bos_token_id
                row[1 : 1 + len(piece)] = piece
                ids.append(row)
                lengths.append(1 + len(piece))
    if not ids:
        raise ValueError(
            f"no document has {shortest} tokens or more, so there is no sequence: give more or longer documents, "
            "or other corpus.attribution_share and corpus.evaluation_share"
        )
    return TokenSequences(np.stack(ids), np.array(lengths, dtype=np.int32))
