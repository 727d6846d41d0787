"""Reading row groups of shards. Imports pyarrow alone: every Ray Data process that reads would pay seconds for torch."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COLUMN = "activation"


class ShardError(ValueError):
    """A shard that cannot be trusted. The message names the file and the remedy."""


def open_shard(path: str | Path) -> pq.ParquetFile:
    """Raises ShardError if the file is missing or is no Parquet file (a truncated one is not)."""
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, f"cannot be opened ({error})") from error


def read_group(path: str | Path, row_group: int) -> pa.Table:
    """One row group. Raises ShardError naming the file if its checksum fails."""
    try:
        return open_shard(path).read_row_group(row_group, columns=[COLUMN], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, f"row group {row_group} cannot be read ({error})") from error


def read_units(units: pa.Table) -> pa.Table:
    """A Ray Data task: the rows of these (file, row_group) units, in their order."""
    files, groups = units["file"].to_pylist(), units["row_group"].to_pylist()
    return pa.concat_tables(read_group(file, group) for file, group in zip(files, groups)).combine_chunks()


def damaged(path: str | Path, what: str) -> ShardError:
    """The error to raise for a shard on disk, with its remedy."""
    return ShardError(
        f"activation shard {path}: {what}. Delete this file and run `python -m dmsae_ray.harvest` with the same "
        "configuration: only the missing shard is made again"
    )
