"""Encoding: documents become token ids, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dmsae_ray.corpus.documents import Document

ENCODE_DOCUMENTS = 64
"""Documents handed to the tokenizer at a time: bounds memory, keeps its threads busy."""


@dataclass(frozen=True)
class EncodedDocument:
    """A document and its tokens."""

    text: str
    ids: np.ndarray
    """int32 [n], no special tokens"""


def encode(documents: Iterable[Document], tokenizer) -> Iterator[EncodedDocument]:
    """Yield documents with their tokens, in order; reads at most ENCODE_DOCUMENTS ahead of what it has yielded.

    tokenizer: a transformers tokenizer. A special token's name in a text is text, never that token.
    """
    stream = iter(documents)
    while texts := [document.text for document in islice(stream, ENCODE_DOCUMENTS)]:
        # verbose=False: documents are longer than the model's context, and are cut into sequences later.
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        for text, ids in zip(texts, encoded["input_ids"]):
            yield EncodedDocument(text, np.array(ids, dtype=np.int32))
