"""Labelled texts: CSV files with a text and a label a row, loose, compressed or in the wheel of sae-probes."""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

TEXT_FIELDS, LABEL_FIELDS = ("text", "prompt"), ("label", "target")
"""Columns by the first of these names that a file has; `prompt` and `target` are sae-probes'."""


@dataclass(frozen=True)
class Labelled:
    """One data set. N texts, T of them to train on."""

    name: str
    texts: list[str]
    positive_N: np.ndarray
    """bool: the second of two labels, in alphabetical order"""
    train_N: np.ndarray
    """bool: half of the texts of each label"""


def read_all(places: list[Path], most: int, seed: int) -> tuple[list[Labelled], dict[str, str]]:
    """Data sets with two labels, at most `most` texts each, and why others are left out, by name.

    places: CSV files (also .zst, .gz), folders of them, or wheels and zip files, in which those in a folder
    `cleaned_data` count. Raises ValueError, naming the file, if one is none.
    """
    found, left_out = [], {}
    for name, content in _files(places):
        rows = _rows(name, content)
        labels = sorted({label for _, label in rows})
        if len(labels) != 2:
            left_out[name] = f"has {len(labels)} labels, a probe needs two"
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        rows = [rows[i] for i in rng.permutation(len(rows))[:most]]
        positive_N = np.array([label == labels[1] for _, label in rows])
        if min(positive_N.sum(), (~positive_N).sum()) < 20:
            left_out[name] = f"has fewer than 20 texts of a label among {len(rows)}"
            continue
        train_N = np.zeros(len(rows), dtype=bool)
        for side in (positive_N, ~positive_N):
            train_N[np.flatnonzero(side)[::2]] = True  # the order is random
        found.append(Labelled(name, [text for text, _ in rows], positive_N, train_N))
    if not found:
        raise ValueError(
            f"--data: no data set with two labels in {', '.join(map(str, places))} ({left_out or 'no CSV'})"
        )
    return found, left_out


def _files(places: list[Path]) -> Iterator[tuple[str, bytes]]:
    for place in places:
        if place.is_dir():
            paths = [path for path in sorted(place.rglob("*")) if ".csv" in path.suffixes]
            yield from ((_name(str(path.relative_to(place))), path.read_bytes()) for path in paths)
        elif place.suffix in (".whl", ".zip"):
            try:
                with zipfile.ZipFile(place) as archive:
                    inside = [name for name in sorted(archive.namelist()) if "/cleaned_data/" in name]
                    yield from ((_name(Path(name).name), archive.read(name)) for name in inside)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"--data {place}: not a readable wheel or zip file ({error})") from error
        elif place.is_file():
            yield _name(place.name), place.read_bytes()
        else:
            raise ValueError(
                f"--data {place}: no such file or folder; `pip download --no-deps sae-probes` gives a wheel"
            )


def _name(path: str) -> str:
    return path.partition(".csv")[0]


def _rows(name: str, content: bytes) -> list[tuple[str, str]]:
    """(text, label) of every row that has both."""
    compression = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}
    kind = next((kind for magic, kind in compression.items() if content.startswith(magic)), None)
    try:
        if kind is not None:
            content = pa.CompressedInputStream(pa.BufferReader(content), kind).read()
        lines = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        fields = [
            next((f for f in names if f in (lines.fieldnames or ())), None) for names in (TEXT_FIELDS, LABEL_FIELDS)
        ]
        if None in fields:
            raise ValueError(
                f"{name}: has the columns {lines.fieldnames}; needs a text ({' or '.join(TEXT_FIELDS)}) and a label "
                f"({' or '.join(LABEL_FIELDS)})"
            )
        text, label = fields
        return [(row[text], row[label]) for row in lines if row[text] and row[label]]
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{name}: not a readable CSV file ({error})") from error
