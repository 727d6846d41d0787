"""One shard: a Parquet file of raw 16-bit activation rows.

A single `fixed_size_binary(2 * d)` column without nulls, plain encoding, uncompressed, no statistics, one page per row
group: any Parquet reader takes it, and a row group's rows stand in the file as in memory (see rowgroup.py). The footer
says what the shard is and holds the checksum of every row group, so a shard describes itself without the manifest.
Letters: N rows, D model dimension.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmsae_ray.activations.rowgroup import COLUMN, ShardError, Unit, damaged, digest_of, read_unit
from dmsae_ray.store import Missing, Store, StoreError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FOOTER_BYTES = 1 << 16
META = b"dmsae_ray"
"""Key of the footer's metadata: a JSON object with `dataset`, `digests`, `positions` and what the manifest says of the
dataset.
"""


@dataclass(frozen=True)
class ShardEntry:
    """What a manifest knows of a shard."""

    file: str
    rows: int
    bytes: int
    offsets: list[int]
    """where each row group's rows start in the file"""
    digests: list[str]
    """checksum of each row group's rows"""
    positions: dict[str, int]
    """positions of the sequences that are not rows here, by reason: bos, padding, outlier, unused (beyond the shard's
    rows)
    """

    def units(self) -> list[Unit]:
        return [Unit(self.file, offset, digest) for offset, digest in zip(self.offsets, self.digests, strict=True)]

    def to_dict(self) -> dict:
        return asdict(self)


class ShardWriter:
    """Encodes shards into memory that it keeps: growing a buffer of half a gigabyte anew takes longer than filling
    it.
    """

    def __init__(self) -> None:
        self._memory = pa.allocate_buffer(0, resizable=True)

    def write(
        self,
        store: Store,
        name: str,
        rows_ND: torch.Tensor,
        rows_per_group: int,
        about: dict,
        positions: dict[str, int],
    ) -> ShardEntry:
        """Write rows [N, D] (float16 or bfloat16), whole or not at all. The bytes depend on the arguments alone.

        about: further facts for the footer. Raises ValueError on rows that are not finite, StoreError if the store
        refuses.
        """
        assert rows_ND.dtype in DTYPES.values() and rows_ND.device.type == "cpu", (rows_ND.dtype, rows_ND.device)
        bad = first_not_finite(rows_ND)
        if bad is not None:
            raise ValueError(f"{name}: row {bad} holds a value that {rows_ND.dtype} cannot store; nothing was written")
        raw = rows_ND.contiguous().view(torch.int16).numpy()
        digests = [digest_of(raw[first : first + rows_per_group]) for first in range(0, len(raw), rows_per_group)]
        content = self._encode(raw, rows_per_group, about | {"digests": digests, "positions": positions})
        entry = _entry(pq.read_metadata(pa.BufferReader(content)), name, len(content))
        # What will stand on disk is checked before it gets its name: offsets and checksums belong together.
        for unit, length in zip(entry.units(), group_bytes(entry, rows_per_group, raw.shape[1] * 2), strict=True):
            assert digest_of(content[unit.offset : unit.offset + length]) == unit.digest, (
                f"{name}: encoded otherwise than expected"
            )
        store.write(name, content)
        return entry

    def _encode(self, raw_ND: np.ndarray, rows_per_group: int, meta: dict) -> pa.Buffer:
        size = raw_ND.shape[1] * 2
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(raw_ND), [None, pa.py_buffer(raw_ND)])
        schema = pa.schema(
            [pa.field(COLUMN, pa.binary(size), nullable=False)], metadata={META: json.dumps(meta, sort_keys=True)}
        )
        groups = -(-len(raw_ND) // rows_per_group)
        room = raw_ND.nbytes + (1 << 16) + 4096 * groups + 8 * len(json.dumps(meta))
        if self._memory.size < room:
            self._memory = pa.allocate_buffer(room, resizable=True)
        sink = pa.FixedSizeBufferWriter(self._memory)
        pq.write_table(
            pa.table([column], schema=schema),
            sink,
            row_group_size=rows_per_group,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            data_page_size=max(1 << 20, 2 * size * rows_per_group),
            write_batch_size=rows_per_group,
        )
        return self._memory.slice(0, sink.tell())


def first_not_finite(rows_ND: torch.Tensor) -> int | None:
    """The first row that holds NaN or infinity, by its exponent bits (several times faster than isfinite on 16-bit
    floats).
    """
    exponent = 0x7C00 if rows_ND.dtype == torch.float16 else 0x7F80
    for first in range(0, len(rows_ND), 4096):  # in pieces that stay in the cache
        bits_ND = rows_ND[first : first + 4096].view(torch.int16) & exponent
        if int(bits_ND.max()) == exponent:
            return first + int((bits_ND == exponent).any(dim=1).nonzero()[0])
    return None


def inspect_shard(store: Store, name: str) -> tuple[ShardEntry, dict]:
    """What a shard says of itself: its entry, and the footer's facts. Reads the footer only.

    Raises ShardError if it is missing, no Parquet file (a truncated one is not), or none of ours; StoreError if it
    cannot be reached.
    """
    size = store.size(name)
    if size is None:
        raise damaged(store.where(name), "is missing")
    try:
        footer = _footer(store, name, size)
        return _entry(footer, name, size), _meta(footer.schema.to_arrow_schema())
    except (
        ValueError,
        TypeError,
        LookupError,
        OSError,
    ) as error:  # whatever someone else's or a flipped footer may lead to
        if isinstance(error, StoreError) and not isinstance(error, Missing):
            raise
        raise damaged(store.where(name), f"cannot be read as a shard ({error})") from error


def _footer(store: Store, name: str, size: int) -> pq.FileMetaData:
    """A Parquet file says in its last eight bytes how long its footer is; one read of the end is enough for most."""
    tail = store.read_range(name, max(0, size - FOOTER_BYTES), FOOTER_BYTES)
    needed = int.from_bytes(tail[-8:-4].to_pybytes(), "little") + 8
    if len(tail) < needed <= size:
        tail = store.read_range(name, size - needed, needed)
    return pq.read_metadata(pa.BufferReader(tail))


def _meta(schema: pa.Schema) -> dict:
    return json.loads(schema.metadata[META])


def _entry(footer: pq.FileMetaData, name: str, size: int) -> ShardEntry:
    meta = _meta(footer.schema.to_arrow_schema())
    width = footer.schema.to_arrow_schema().field(COLUMN).type.byte_width
    offsets = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        column = group.column(0)
        # The rows are the end of the column's only page: what stands before them is its header.
        offsets.append(column.data_page_offset + column.total_compressed_size - group.num_rows * width)
    return ShardEntry(name, footer.num_rows, size, offsets, meta["digests"], meta["positions"])


def group_bytes(entry: ShardEntry, rows_per_group: int, row_bytes: int) -> list[int]:
    """Bytes of each row group; the last may be shorter."""
    return [min(rows_per_group, entry.rows - first) * row_bytes for first in range(0, entry.rows, rows_per_group)]


def as_tensor(rows: pa.Buffer | pa.Array, d: int, dtype: str) -> torch.Tensor:
    """Rows of a shard as [N, D] without copying. The result must not be written to."""
    if isinstance(rows, pa.Array):
        array = np.frombuffer(rows.buffers()[1], dtype=np.int16).reshape(-1, d)[rows.offset : rows.offset + len(rows)]
    else:
        array = np.frombuffer(rows, dtype=np.int16).reshape(-1, d)
    with warnings.catch_warnings():
        # Maps and Ray's blocks are read-only memory: numpy views it, torch.frombuffer would refuse.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(DTYPES[dtype])


def read_rows(store: Store, entry: ShardEntry, rows_per_group: int, d: int, dtype: str) -> torch.Tensor:
    """All rows of a shard, [N, D], in the stored precision. Raises ShardError if a checksum fails."""
    lengths = group_bytes(entry, rows_per_group, 2 * d)
    return torch.cat(
        [
            as_tensor(read_unit(store, unit, length), d, dtype)
            for unit, length in zip(entry.units(), lengths, strict=True)
        ]
    )


__all__ = [
    "DTYPES",
    "ShardEntry",
    "ShardError",
    "ShardWriter",
    "StoreError",
    "as_tensor",
    "first_not_finite",
    "group_bytes",
    "inspect_shard",
    "read_rows",
]
