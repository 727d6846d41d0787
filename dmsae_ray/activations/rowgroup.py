"""Reading row groups of shards, as bytes that were checked. Imports no torch: every Ray Data process that reads would
pay seconds for it.

A row group of a shard is one Parquet page of plain values, so its rows stand in the file as they stand in memory. The
manifest says where, and which checksum they have: reading is one range of one file, without parsing, and nothing is
trusted that was not hashed. (xxh3 reads 15 GB/s here, Parquet's own page checksums 1.7.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import xxhash

from dmsae_ray.store import Missing, Store

COLUMN = "activation"
REPAIR = "python -m dmsae_ray.harvest --repair"


class ShardError(ValueError):
    """A shard that cannot be trusted. The message names the file and the remedy."""


class Unit(NamedTuple):
    """One row group: where its rows stand, and their checksum."""

    file: str
    offset: int
    digest: str


def digest_of(content) -> str:
    """Checksum of rows as they stand in memory: xxh3, 64 bits, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(content)


def read_unit(store: Store, unit: Unit, length: int) -> pa.Buffer:
    """The bytes of a row group. Raises ShardError if they are not those the manifest knows."""
    try:
        rows = store.read_range(unit.file, unit.offset, length)
    except Missing as error:
        raise damaged(store.where(unit.file), "is missing") from error
    if len(rows) < length:
        raise damaged(
            store.where(unit.file),
            f"ends at byte {unit.offset + len(rows)}, before its row group at {unit.offset} does",
        )
    if digest_of(rows) != unit.digest:
        raise damaged(
            store.where(unit.file), f"the row group at byte {unit.offset} has not the checksum that the manifest knows"
        )
    return rows


def read_units(
    units: pa.Table, store: Store, length: int, row_bytes: int, per_block: int, fetch_ahead: int
) -> Iterator[pa.Table]:
    """A Ray Data task: the rows of these units (a row each: file, offset, digest), in their order, as blocks of
    `per_block` units.

    Every unit is one chunk of its block. fetch_ahead: units fetched at the same time from a remote store. A local one
    is mapped, and the next block's rows are hashed while Ray copies this one's into shared memory.
    """
    wanted = [Unit(*row.values()) for row in units.select(["file", "offset", "digest"]).to_pylist()]
    threads, ahead = (1, per_block) if store.local else (fetch_ahead, fetch_ahead)
    with ThreadPoolExecutor(threads) as pool:
        started: deque = deque()

        def start_up_to(place: int) -> None:
            first = place + len(started)
            started.extend(pool.submit(read_unit, store, unit, length) for unit in wanted[first : place + ahead])

        block: list[pa.Array] = []
        for place in range(len(wanted)):
            start_up_to(place)
            rows = started.popleft().result()
            block.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), length // row_bytes, [None, rows]))
            if len(block) == per_block or place == len(wanted) - 1:
                start_up_to(place + 1)  # before the block is given away and this thread waits
                yield pa.table({COLUMN: pa.chunked_array(block)})
                block = []


def damaged(where: str, what: str) -> ShardError:
    """The error to raise for a shard, with its remedy."""
    return ShardError(
        f"activation shard {where}: {what}. `{REPAIR}` with the same configuration finds every bad shard and makes "
        "only those again"
    )


__all__ = ["COLUMN", "REPAIR", "ShardError", "Unit", "damaged", "digest_of", "read_unit", "read_units"]
