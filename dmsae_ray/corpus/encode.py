"""Encoding: documents become token ids, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dmsae_ray.corpus.chat import rendered
from dmsae_ray.corpus.documents import Document

ENCODE_DOCUMENTS = 64
"""Documents handed to the tokenizer at a time: bounds memory, keeps its threads busy."""


@dataclass(frozen=True)
class EncodedDocument:
    """A document and its tokens."""

    document: Document
    ids: np.ndarray
    """int32 [n], no special tokens, except those that the chat template puts between messages"""

    @property
    def text(self) -> str:
        return self.document.text


def encode(documents: Iterable[Document], tokenizer) -> Iterator[EncodedDocument]:
    """Yield documents with their tokens, in order; reads at most ENCODE_DOCUMENTS ahead of what it has yielded.

    tokenizer: a transformers tokenizer. A special token's name in a text is text, never that token. Chat messages are
    what the tokenizer's chat template makes of them, whose special tokens are meant; only a BOS at its start is left
    out, since every sequence begins with one. Raises ValueError naming a document whose messages the template refuses.
    """
    stream = iter(documents)
    while some := list(islice(stream, ENCODE_DOCUMENTS)):
        chat = some[0].messages is not None  # as all documents of a source
        texts = [
            document.text if document.messages is None else rendered(document.name, document.messages, tokenizer)
            for document in some
        ]
        # verbose=False: documents are longer than the model's context, and are cut into sequences later.
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=not chat, return_attention_mask=False, verbose=False
        )
        for document, ids in zip(some, encoded["input_ids"], strict=True):
            start = 1 if chat and ids[:1] == [tokenizer.bos_token_id] else 0
            yield EncodedDocument(document, np.array(ids[start:], dtype=np.int32))
