"""Rows of a local file, format by format: what stands in the text field, and where.

A row's value is text, bytes that are text in UTF-8, a list of chat messages, or None; documents.py looks at it. A byte
order mark is no part of a text.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmsae_ray.corpus.local_files import TEXT, open_bytes, saved_files, suffix_of

READ_ROWS = 256  # Parquet rows in memory at a time
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError, csv.Error, RecursionError)
"""What readers raise for a file that is damaged, may not be read or is not what its name says."""
Row = tuple[str, Any]


def file_rows(path: Path, text_field: str) -> Iterator[Row]:
    """Yield (place, value). Raises ValueError naming the file, and line or row, for whatever cannot be read."""
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; remove it or give another corpus.source")
        yield from _reader(path)(path, text_field)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read ({reason}); repair or remove it") from error


def saved_rows(folder: Path, text_field: str) -> Iterator[Row]:
    """Rows of a folder that save_to_disk wrote, of its `train` split if it is a dict. Raises ValueError naming it."""
    from datasets import load_from_disk

    files = {path.name for path in saved_files(folder)}
    try:
        data_folder = folder / "train" if (folder / "dataset_dict.json").is_file() else folder
        named = {str(file["filename"]) for file in json.loads((data_folder / "state.json").read_text())["_data_files"]}
        if strangers := sorted(named - files):  # as a path it could be any file, whose text would be trained on
            raise ValueError(
                f"{data_folder / 'state.json'}: names {strangers[0]!r}, which is no data file of its folder and was "
                "not read; save it again"
            )
        data = load_from_disk(str(data_folder))
        if text_field not in data.column_names:
            raise ValueError(missing(str(folder), text_field, data.column_names))
        for number, row in enumerate(data.select_columns(text_field)):
            yield f"{folder} row {number}", row[text_field]
    except (*UNREADABLE, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: not a readable folder of save_to_disk ({type(error).__name__}: {error}); save it again"
        ) from error


def missing(where: str, text_field: str, fields) -> str:
    """The message for a row, or a file, that lacks the field."""
    there = ", ".join(sorted(map(str, fields))) or "none"
    return f"{where}: no field {text_field!r} (corpus.text_field); its fields are: {there}"


def decoded(where: Path | str, raw: bytes) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError naming the place."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error


def value_of(where: str, row: Any, text_field: str) -> Any:
    """What stands in the field. Raises ValueError naming the place if the row is no object with that field."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the field {text_field!r}, got {type(row).__name__}")
    if text_field not in row:
        raise ValueError(missing(where, text_field, row))
    return row[text_field]


def _reader(path: Path):
    suffix = suffix_of(path)
    if suffix in TEXT:
        return _whole
    return {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[suffix]


def _whole(path: Path, text_field: str) -> Iterator[Row]:
    with open_bytes(path) as file:
        yield str(path), decoded(path, file.read())


def _json_lines(path: Path, text_field: str) -> Iterator[Row]:
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            text = decoded(where, line)
            if text.strip():
                yield where, value_of(where, _parsed(where, text, "; .jsonl has one object per line"), text_field)


def _json(path: Path, text_field: str) -> Iterator[Row]:
    """An object, a list of objects, or objects one per line, as many a .json file has them."""
    with open_bytes(path) as file:
        text = decoded(path, file.read())
    if not text.strip():
        raise ValueError(f"{path}: the file has nothing in it; remove it or give another corpus.source")
    first = text.lstrip().partition("\n")[0]
    try:
        one_per_line = text.lstrip().count("\n") > 0 and isinstance(json.loads(first), dict)
    except ValueError:
        one_per_line = False
    if one_per_line:
        yield from _json_lines(path, text_field)
        return
    tree = _parsed(str(path), text)
    if isinstance(tree, dict):
        yield str(path), value_of(str(path), tree, text_field)
        return
    for number, row in enumerate(tree if isinstance(tree, list) else [tree]):
        yield f"{path} item {number}", value_of(f"{path} item {number}", row, text_field)


def _parsed(where: str, text: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)}){hint}") from error


def _csv(path: Path, text_field: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 131 072 characters that are the default
    with open_bytes(path) as file:
        lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        header = next(lines, [])
        if text_field not in header:
            raise ValueError(missing(f"{path} line 1", text_field, header))
        column = header.index(text_field)
        for row in lines:
            if row and len(row) <= column:
                raise ValueError(
                    f"{path} line {lines.line_num}: has {len(row)} columns, {text_field!r} is number {column + 1}"
                )
            if row:
                yield f"{path} line {lines.line_num}", row[column]


def _parquet(path: Path, text_field: str) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    if text_field not in file.schema_arrow.names:
        raise ValueError(missing(str(path), text_field, file.schema_arrow.names))
    number, kind = 0, file.schema_arrow.field(text_field).type
    if not _may_hold_text(kind):
        raise ValueError(f"{path}: field {text_field!r} holds {kind}, not text; set corpus.text_field")
    for batch in file.iter_batches(READ_ROWS, columns=[text_field]):
        for value in batch.column(0).to_pylist():
            yield f"{path} row {number}", value
            number += 1


def _may_hold_text(kind: pa.DataType) -> bool:
    """Text in any of Arrow's forms, bytes, nothing but nulls, or chat messages; a dictionary (categories) of them as
    well. Nothing of a type that Arrow was taught: Ray Data's objects, for one, are unpickled where they are read.
    """
    types = pa.types
    if _was_taught(kind):
        return False
    if types.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_struct(kind.value_type)
    forms = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    return any(form(kind) for form in forms)


def _was_taught(kind: pa.DataType) -> bool:
    """Whether a type, or one of those that it is made of, is an extension."""
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _was_taught(kind.value_type)
    return any(_was_taught(kind.field(place).type) for place in range(kind.num_fields))
