"""A file of token sequences: safetensors with ids [N, T], lengths [N] and rows [N], written as they come, read by
mapping.

Letters: N sequences, T context. See tokens.py for what the three arrays hold.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dmsae_ray.files import present, replace, temporary_name

FORMAT_VERSION = "2"
NAMES = ("ids", "lengths", "rows")
MANY = 10**12
"""Sequences that the header leaves room for."""


class TokenFileWriter:
    """Writes one file, whole or not at all: under a temporary name until `finish`. Leaving the context without it
    removes that.

    Safetensors puts its header first, but the number of sequences is known last. So room is left for the header of MANY
    sequences and of this metadata, and the header written at the end is filled up with spaces, which the format allows.
    Lengths and rows, eight bytes a sequence, are held until then, since they follow the ids in the file.
    """

    def __init__(self, path: Path, context: int, largest_metadata: Mapping[str, str]):
        """largest_metadata: as long as that given to `finish`, or longer."""
        self.path, self.context, self.count = path, context, 0
        self._temporary = temporary_name(path)
        self._lengths, self._rows = array("i"), array("i")
        self._room = len(self._header(MANY, largest_metadata))
        self._file = self._temporary.open("wb")
        self._file.write(bytes(8 + self._room))

    def extend(self, ids_NT: np.ndarray, lengths_N: np.ndarray, rows_N: np.ndarray) -> None:
        """Append sequences, all int32."""
        assert ids_NT.shape == (len(lengths_N), self.context) and len(rows_N) == len(lengths_N)
        assert ids_NT.dtype == lengths_N.dtype == rows_N.dtype == np.int32
        self._file.write(ids_NT.tobytes())
        self._lengths.frombytes(lengths_N.tobytes())
        self._rows.frombytes(rows_N.tobytes())
        self.count += len(lengths_N)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Complete the file and give it its name."""
        self._file.write(self._lengths.tobytes())
        self._file.write(self._rows.tobytes())
        header = self._header(self.count, metadata)
        assert len(header) <= self._room, (len(header), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        replace(self._temporary, self.path)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)  # gone already if finished

    def _header(self, count: int, metadata: Mapping[str, str]) -> bytes:
        shapes = dict(zip(NAMES, ([count, self.context], [count], [count]), strict=True))
        # Sorted, since safetensors gives metadata back in no fixed order: the same sequences are the same bytes.
        header: dict = {"__metadata__": dict(sorted({"format_version": FORMAT_VERSION, **metadata}.items()))}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 4 * int(np.prod(shape, dtype=object))
            header[name] = {"dtype": "I32", "shape": shape, "data_offsets": [start, end]}
        raw = json.dumps(header).encode()
        return raw.ljust(-(-len(raw) // 8) * 8)  # so that the data after it are aligned


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The three arrays, read-only and mapped: nothing is read before it is used.

    Raises ValueError naming the file and the remedy if it is missing, incomplete or of another format.
    """
    with _open(path) as file:  # compares the header with the size of the file, so the offsets below lie inside it
        shapes = {name: file.get_slice(name).get_shape() for name in NAMES}
    with path.open("rb") as raw:
        header_bytes = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(header_bytes))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
    arrays = {}
    for name in NAMES:
        start, end = header[name]["data_offsets"]
        arrays[name] = np.asarray(data[start:end]).view(np.int32).reshape(shapes[name])
    return arrays


def read_metadata(path: Path) -> dict[str, str]:
    """What was saved beside the sequences. Raises ValueError like `map_arrays`."""
    with _open(path) as file:
        return file.metadata()


def _open(path: Path):
    remedy = "delete it, and the harvest makes it again"
    if not present(path):
        raise ValueError(f"{path}: no such file of token sequences; harvest first")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged file of token sequences ({error}); {remedy}") from error
    found = (file.metadata() or {}).get("format_version")
    if found != FORMAT_VERSION or set(file.keys()) != set(NAMES):
        raise ValueError(f"{path}: token sequences of format {found}, this version reads {FORMAT_VERSION}; {remedy}")
    return file
