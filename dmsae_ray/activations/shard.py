"""One shard: a Parquet file of raw 16-bit activation rows.

A single `fixed_size_binary(2 * d)` column, plain encoding, uncompressed, no statistics: it reads at memory speed,
where a list column is several times slower and 16-bit integers double in size. Every page carries a checksum that
reading verifies, so an altered byte is an error and never a number. Letters: N rows, D model dimension.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmsae_ray.activations.rowgroup import COLUMN, ShardError, open_shard, read_group

__all__ = ["COLUMN", "DTYPES", "ShardError", "as_tensor", "file_sha256", "open_shard", "read_group", "read_rows", "write_shard"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def write_shard(path: Path, rows_ND: torch.Tensor, rows_per_group: int, metadata: dict[str, str]) -> None:
    """Write rows [N, D] (float16 or bfloat16) under a temporary name, then rename.

    The bytes depend on the arguments alone. Raises ValueError on rows that are not finite.
    """
    assert rows_ND.dtype in DTYPES.values(), rows_ND.dtype
    finite = torch.isfinite(rows_ND).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"{path.name}: row {bad} holds a value that {rows_ND.dtype} cannot store; nothing was written")
    d = rows_ND.shape[1]
    raw = rows_ND.contiguous().view(torch.int16).numpy()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * d), len(raw), [None, pa.py_buffer(raw)])
    schema = pa.schema([pa.field(COLUMN, pa.binary(2 * d), nullable=False)], metadata=metadata)
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    try:
        pq.write_table(
            pa.table([column], schema=schema), temporary, row_group_size=rows_per_group, compression="none",
            use_dictionary=False, write_statistics=False, write_page_checksum=True, data_page_size=64 << 20,
        )  # fmt: skip
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_tensor(column: pa.ChunkedArray | pa.Array, d: int, dtype: str) -> torch.Tensor:
    """A binary column as [N, D] without copying where it is one chunk. The result must not be written to."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        # Ray's blocks are read-only memory: numpy views it, torch.frombuffer would refuse.
        raw = np.frombuffer(chunk.buffers()[1], dtype=np.int16)
        parts.append(raw.reshape(-1, d)[chunk.offset : chunk.offset + len(chunk)])
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(DTYPES[dtype])


def read_rows(path: str | Path, d: int, dtype: str) -> torch.Tensor:
    """All rows of a shard, [N, D], in the stored precision."""
    file = open_shard(path)
    return torch.cat([as_tensor(read_group(path, g)[COLUMN], d, dtype) for g in range(file.num_row_groups)])


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
