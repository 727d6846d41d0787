"""Documents: pieces of text with a name, from the embedded corpus, local files or the Hugging Face hub."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dmsae_ray.corpus.hub import hub_commit, hub_rows
from dmsae_ray.place import has_form_of_hub_id
from dmsae_ray.secret_url import masked

EMBEDDED = Path(__file__).parent / "embedded" / "documents.parquet"
SUFFIXES = (".txt", ".jsonl", ".parquet")
READ_ROWS = 256  # Parquet rows in memory at a time


@dataclass(frozen=True)
class Document:
    """One piece of text."""

    name: str
    """where it came from, for messages"""
    text: str


def load_documents(source: str, text_field: str = "text", revision: str | None = None) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order; texts that are empty or null are left out.

    source: "embedded" (shipped with the package) | a .txt file (one document), .jsonl or .parquet file (a document per
    row), a folder (searched recursively) or a glob of them | a hub data set, `owner/name` or `owner/name:configuration`,
    of which the `train` split is streamed at `revision`.

    Raises ValueError naming the file, line and field for whatever cannot be read, and if there is no text at all.
    """
    if source == "embedded":
        for row in pq.read_table(EMBEDDED).to_pylist():
            yield Document(row["name"], row["text"])
        return
    if is_hub(source):
        rows = ((where, _text_of(where, row, text_field)) for where, row in hub_rows(source, revision))
    else:
        rows = _local_rows(source, text_field)
    count = 0
    for name, text in rows:
        if text is None or not text.strip():
            continue
        count += 1
        yield Document(name, text)
    if not count:
        raise ValueError(f"corpus.source {masked(source)}: no document has any text in it; give a source with text")


def check_source(source: str, text_field: str) -> None:
    """Find out cheaply whether a source can be read: paths, formats and the field's presence in each first row.

    A hub data set is checked by its id only; no network is used. Raises ValueError like `load_documents`.
    """
    if source == "embedded" or is_hub(source):
        return
    for path in local_files(source):
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; remove it or give another corpus.source")
        if path.suffix == ".parquet":
            _open_parquet(path, text_field)
        elif path.suffix == ".jsonl":
            next(_jsonl_rows(path, text_field), None)


def corpus_fingerprint(source: str, text_field: str = "text", revision: str | None = None) -> str:
    """A hash of what decides the documents: the files' bytes, or a hub data set's id and commit.

    Raises ValueError if a file is missing or the hub cannot say which commit `revision` is.
    """
    digest = hashlib.sha256()
    if source != "embedded":
        digest.update(f"field {text_field}\n".encode())
    if source != "embedded" and is_hub(source):
        digest.update(f"hub {source} {hub_commit(source, revision)}".encode())
        return digest.hexdigest()
    for path in [EMBEDDED] if source == "embedded" else local_files(source):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def is_hub(source: str) -> bool:
    """Whether a source names a hub data set: it has the form of one. The configuration has made what is local absolute."""
    return has_form_of_hub_id(source) and not source.endswith(SUFFIXES)


def local_files(source: str) -> list[Path]:
    """The files of a local source, sorted by path. Raises ValueError if there are none that can be read."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"corpus.source {masked(source)}: the folder holds no {', '.join(SUFFIXES)} file")
        return found
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(
            f"corpus.source {masked(source)}: no such file or folder, and nothing matches it as a glob; give `embedded`, a path to "
            f"{', '.join(SUFFIXES)} files, or a hub data set id such as owner/name"
        )
    for p in found:
        if p.suffix not in SUFFIXES:
            raise ValueError(f"{p}: cannot read {p.suffix or 'files without a suffix'} as text; corpus.source takes {', '.join(SUFFIXES)}")
    return found


def _local_rows(source: str, text_field: str) -> Iterator[tuple[str, str | None]]:
    for path in local_files(source):
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; remove it or give another corpus.source")
        if path.suffix == ".txt":
            yield str(path), _decode(path, path.read_bytes())
        elif path.suffix == ".jsonl":
            yield from _jsonl_rows(path, text_field)
        else:
            yield from _parquet_rows(path, text_field)


def _decode(where: Path | str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error


def _text_of(where: str, row: object, text_field: str) -> str | None:
    """The text of one row. Raises ValueError naming the field."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the field {text_field!r}, got {type(row).__name__}")
    if text_field not in row:
        fields = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{where}: no field {text_field!r} (corpus.text_field); its fields are: {fields}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} holds {type(text).__name__}, not text; set corpus.text_field")
    return text


def _jsonl_rows(path: Path, text_field: str) -> Iterator[tuple[str, str | None]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(where, line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); .jsonl has one object per line") from error
            yield where, _text_of(where, row, text_field)


def _open_parquet(path: Path, text_field: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    if text_field not in file.schema_arrow.names:
        fields = ", ".join(sorted(file.schema_arrow.names)) or "none"
        raise ValueError(f"{path}: no field {text_field!r} (corpus.text_field); its fields are: {fields}")
    kind = file.schema_arrow.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path}: field {text_field!r} holds {kind}, not text; set corpus.text_field")
    return file


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[str, str | None]]:
    number = 0
    for batch in _open_parquet(path, text_field).iter_batches(READ_ROWS, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            yield f"{path} row {number}", text
            number += 1
