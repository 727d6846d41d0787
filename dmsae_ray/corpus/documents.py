"""Documents: pieces of text with a name, from the embedded corpus, local files or the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dmsae_ray.corpus.chat import FIELDS, messages_of, plain
from dmsae_ray.corpus.file_rows import decoded, file_rows, saved_rows, value_of
from dmsae_ray.corpus.hub_text import hub_commit, hub_content, hub_rows
from dmsae_ray.corpus.local_files import (
    EMBEDDED,
    TEXT,
    FileState,
    file_hash,
    is_hub,
    is_saved,
    local_files,
    suffix_of,
)
from dmsae_ray.corpus.pieces import BOOK, PIECE, pieces_of
from dmsae_ray.secret_url import masked


@dataclass(frozen=True)
class Document:
    """One piece of text."""

    name: str
    """where it came from, for messages"""
    text: str
    messages: list[dict[str, str]] | None = None
    """chat messages, of which the tokenizer's chat template makes the text; `text` is then their JSON"""
    whole: str | None = None
    """the text that decides the split, where it is not this one: that of the document that this is a piece of"""
    replaced: int = 0
    """characters of it that are no text (halves of a pair, as JSON may have them alone), U+FFFD in their place"""


def load_documents(
    source: str, text_field: str = "text", revision: str | None = None, piece_characters: int | None = None
) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order; texts that are empty or null are left out.

    source: "embedded" (shipped with the package) | a text file (one document) or a file of rows, see local_files.py | a
    folder (searched recursively), a glob of them, or a folder of save_to_disk | a hub data set, `owner/name` or
    `owner/name:configuration`, of which the `train` split is streamed at `revision`.
    piece_characters: longer documents are cut into pieces of at most so many, each with a split of its own; None: only
    text files longer than BOOK, into pieces of PIECE.

    Raises ValueError naming the file, line and field for whatever cannot be read, and if there is no text at all.
    """
    if source == "embedded":
        for row in pq.read_table(EMBEDDED).to_pylist():
            yield Document(row["name"], row["text"])
        return
    count = 0
    chat = text_field in FIELDS if is_hub(source) else None
    for name, value, is_text_file in _rows(source, text_field, revision):
        document = document_of(name, value, text_field)
        if document is None:
            continue
        chat = document.messages is not None if chat is None else chat
        if chat != (document.messages is not None):
            raise ValueError(
                f"{name}: field {text_field!r} holds "
                f"{'text where chat messages' if chat else 'chat messages where text'} stood before, or was expected "
                f"(in a hub data set they are read from a field called {', '.join(FIELDS)}); make it one of the two"
            )
        count += 1
        limit = piece_characters or (PIECE if is_text_file and len(document.text) > BOOK else None)
        if limit is None or len(document.text) <= limit or chat:
            yield document
            continue
        for number, text in enumerate(pieces_of(document.text, limit)):
            if text.strip():
                yield Document(
                    f"{name} piece {number}", text, replaced=text.count("\ufffd") if document.replaced else 0
                )
    if not count:
        raise ValueError(f"corpus.source {masked(source)}: no document has any text in it; give a source with text")


def embedded_sample() -> Iterator[Document]:
    """The embedded corpus in pieces, in a fixed random order, so that the first of them are a sample of it all.

    It is sorted by name, and its documents are long: its first ones would be a few chapters about one thing. A piece
    belongs to the split of its whole document, on which the tiny model was, or was not, trained.
    """
    pieces = [
        Document(f"{document.name} piece {number}", text, whole=document.text)
        for document in load_documents("embedded")
        for number, text in enumerate(pieces_of(document.text, 2 * PIECE))
    ]
    yield from sorted(pieces, key=lambda piece: hashlib.sha256(f"order {piece.name}".encode()).digest())


def document_of(name: str, value: Any, text_field: str) -> Document | None:
    """The document that a row's value is; None if it is empty or null. Raises ValueError naming the place if it is
    neither text nor chat.
    """
    messages = None
    if isinstance(value, bytes):
        value = decoded(name, value)
    if isinstance(value, list | tuple):
        messages = messages_of(name, value)
        value = plain(messages) if messages else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: field {text_field!r} holds {type(value).__name__}, not text; set corpus.text_field")
    if value is None or not value.strip():
        return None
    text = value if _is_text(value) else _clean(value)
    replaced = 0 if text is value else sum(a != b for a, b in zip(value, text, strict=True))
    if replaced and messages:
        messages = [{key: _clean(part) for key, part in message.items()} for message in messages]
    return Document(name, text, messages, replaced=replaced)


def check_source(source: str, text_field: str, revision: str | None = None) -> bool:
    """Find out cheaply whether a source can be read: paths, formats and the field's presence in each first row; of a
    hub data set, whether the hub has it. Returns whether it holds chat messages. Raises ValueError like
    `load_documents`.
    """
    if source == "embedded":
        return False
    if is_hub(source):
        hub_content(source, revision)
        return text_field in FIELDS
    return _first_rows(source, text_field, tuple((path, FileState.of(path)) for path in local_files(source)))


@lru_cache(maxsize=64)
def _first_rows(source: str, text_field: str, files: tuple[tuple[Path, FileState], ...]) -> bool:
    """Whether the first document that a first row holds is chat messages; looked at once while the files stay the
    same.
    """
    path = Path(source)
    starts = (
        [saved_rows(path, text_field)]
        if is_saved(path)
        else [file_rows(path, text_field) for path, _ in files if suffix_of(path) not in TEXT]
    )
    firsts = [document_of(*first, text_field) for rows in starts if (first := next(rows, None)) is not None]
    for path, state in files:
        if state.size == 0:
            raise ValueError(f"{path}: the file is empty; remove it or give another corpus.source")
    documents = [first for first in firsts if first is not None]
    return bool(documents) and documents[0].messages is not None


def corpus_fingerprint(source: str, text_field: str = "text", revision: str | None = None) -> str:
    """A hash of what decides the documents: the files' bytes, or what the hub says about those of a data set. Made of
    something else, it raises `FORMAT_VERSION` of activations/found.py.

    Raises ValueError if a file is missing, or the hub has no such data set or cannot be asked.
    """
    digest = hashlib.sha256()
    if source != "embedded":
        digest.update(f"field {text_field}\n".encode())
    if source != "embedded" and is_hub(source):
        digest.update(f"hub {source} {hub_content(source, revision)}".encode())
        return digest.hexdigest()
    for path in [EMBEDDED] if source == "embedded" else local_files(source):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def _rows(source: str, text_field: str, revision: str | None) -> Iterator[tuple[str, Any, bool]]:
    """(place, value, whether it is a whole text file)."""
    path = Path(source)
    if is_hub(source):
        for where, row in hub_rows(source, hub_commit(source, revision)):
            yield where, value_of(where, row, text_field), False
    elif is_saved(path):
        for where, value in saved_rows(path, text_field):
            yield where, value, False
    else:
        for file in local_files(source):
            for where, value in file_rows(file, text_field):
                yield where, value, suffix_of(file) in TEXT


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which no UTF-8 has, become U+FFFD."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
