"""One shard: rows bit for bit, the same bytes for the same rows, and no number out of a damaged file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import NOTHING, PER_GROUP, D, bits, some_rows, write

from dmsae_ray.activations.rowgroup import ShardError, read_unit, read_units
from dmsae_ray.activations.shard import (
    COLUMN,
    DTYPES,
    META,
    ShardWriter,
    as_tensor,
    first_not_finite,
    group_bytes,
    inspect_shard,
    read_rows,
)
from dmsae_ray.store import Store

ROWS = (1, 7, 8, 9, 20, 64)
"""Less than a group of 8, whole groups, and groups with a rest."""
F = "s.parquet"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_come_back_bit_for_bit(store, rows, dtype):
    rows_ND = some_rows(rows, dtype=dtype)
    back_ND = read_rows(store, write(store, F, rows_ND), PER_GROUP, D, dtype)
    assert back_ND.dtype == DTYPES[dtype] and torch.equal(bits(back_ND), bits(rows_ND))


def test_every_finite_bit_pattern_comes_back(store):
    for dtype in DTYPES:
        all_N = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[dtype])
        rows_ND = all_N[torch.isfinite(all_N.float())][:63_000].reshape(-1, 9)
        back_ND = read_rows(store, write(store, F, rows_ND, 512), 512, 9, dtype)
        assert torch.equal(bits(back_ND), bits(rows_ND))


@pytest.mark.parametrize("rows", ROWS)
def test_offsets_point_at_the_rows(store, rows):
    rows_ND = some_rows(rows)
    entry = write(store, F, rows_ND)
    raw = (store.local / F).read_bytes()
    assert (entry.rows, entry.bytes, len(entry.offsets)) == (rows, len(raw), -(-rows // PER_GROUP))
    for number, (offset, length) in enumerate(zip(entry.offsets, group_bytes(entry, PER_GROUP, 2 * D), strict=True)):
        assert (
            raw[offset : offset + length]
            == bits(rows_ND[number * PER_GROUP : (number + 1) * PER_GROUP]).numpy().tobytes()
        )
        assert bytes(read_unit(store, entry.units()[number], length)) == raw[offset : offset + length]


@pytest.mark.parametrize("rows", ROWS)
def test_a_shard_says_of_itself_what_its_writer_said(store, rows):
    positions = {"bos": 3, "padding": 9, "outlier": 0, "unused": 4}
    written = ShardWriter().write(
        store, F, some_rows(rows), PER_GROUP, {"dataset": "k", "hook": "h", "d": D}, positions
    )
    found, about = inspect_shard(store, F)
    assert found == written and found.positions == positions
    assert {name: about[name] for name in ("dataset", "hook", "d")} == {"dataset": "k", "hook": "h", "d": D}
    assert type(written)(**json.loads(json.dumps(written.to_dict()))) == written


@pytest.mark.parametrize("rows", ROWS)
def test_any_parquet_reader_takes_it_and_checks_its_pages(store, rows):
    rows_ND = some_rows(rows)
    write(store, F, rows_ND)
    table = pq.read_table(store.local / F, page_checksum_verification=True)
    assert table.column_names == [COLUMN] and table.schema.field(COLUMN).nullable is False
    assert b"".join(table[COLUMN].to_pylist()) == bits(rows_ND).numpy().tobytes()
    raw = bytearray((store.local / F).read_bytes())
    raw[inspect_shard(store, F)[0].offsets[0]] ^= 1
    (store.local / F).write_bytes(raw)
    with pytest.raises(OSError, match="CRC"):  # so that the checksums above were there to be checked
        pq.read_table(store.local / F, page_checksum_verification=True)


def test_same_rows_same_bytes_whatever_the_writer_wrote_before(store):
    writer = ShardWriter()
    for rows, name in ((200, "before"), (20, "a"), (300, "between"), (20, "b")):
        writer.write(store, name, some_rows(rows), PER_GROUP, {"hook": "h", "dataset": "k"}, NOTHING)
    ShardWriter().write(store, "c", some_rows(20), PER_GROUP, {"dataset": "k", "hook": "h"}, NOTHING)
    assert store.read("a") == store.read("b") == store.read("c")
    write(store, "d", some_rows(20, seed=1))
    write(store, "e", some_rows(20), key="other")
    assert len({store.read(name) for name in ("a", "d", "e")}) == 3


def test_rows_that_stand_apart_in_memory_are_written_as_rows(store):
    wide = some_rows(20, d=2 * D)
    assert torch.equal(read_rows(store, write(store, F, wide[:, ::2]), PER_GROUP, D, "float16"), wide[:, ::2])


@pytest.mark.parametrize("bad", ["inf", "-inf", "nan"])
def test_nothing_is_written_of_rows_that_are_not_finite(store, bad):
    rows_ND = some_rows(20)
    rows_ND[13, 3] = float(bad)
    with pytest.raises(ValueError, match=r"s\.parquet: row 13 .*torch\.float16.*nothing was written"):
        write(store, F, rows_ND)
    assert list(store.local.iterdir()) == []


def planted(dtype, rows, places):
    """Random rows of the type's whole range with NaN and infinities at these places."""
    rows_ND = (torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) * 1e4).to(DTYPES[dtype])
    rows_ND[0, 0], rows_ND[-1, -1] = torch.finfo(rows_ND.dtype).max, torch.finfo(rows_ND.dtype).min
    for row, column, value in places:
        rows_ND[row % rows, column] = float(value)
    return rows_ND


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 12_500),
    st.lists(st.tuples(st.integers(0, 12_500), st.integers(0, 4), st.sampled_from(["nan", "inf", "-inf"])), max_size=3),
)
def test_the_first_row_that_is_not_finite_is_that_of_isfinite(dtype, rows, places):
    rows_ND = planted(dtype, rows, places)
    bad = (~torch.isfinite(rows_ND).all(dim=1)).nonzero().flatten().tolist()
    assert first_not_finite(rows_ND) == (bad[0] if bad else None)


def test_nan_is_found_whatever_its_bits():
    """Any mantissa, either sign: computation makes one pattern, broken memory others."""
    for dtype, patterns in (("float16", (0x7C01, 0x7FFF, -1, -0x3FF)), ("bfloat16", (0x7F81, 0x7FFF, -1, -0x7F))):
        for pattern in patterns:
            rows_ND = torch.zeros(9, D, dtype=torch.int16)
            rows_ND[4, 2] = pattern
            assert first_not_finite(rows_ND.view(DTYPES[dtype])) == 4, (dtype, hex(pattern))


def test_a_view_of_a_block_is_the_block_s_rows():
    rows_ND = some_rows(20)
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * D), 20, [None, pa.py_buffer(bits(rows_ND).numpy())])
    assert torch.equal(as_tensor(array.slice(2, 3), D, "float16"), rows_ND[2:5])
    assert torch.equal(as_tensor(pa.py_buffer(bits(rows_ND).numpy()), D, "float16"), rows_ND)


# -- reading many row groups
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_block, sizes", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (9, [7])])
def test_a_read_task_gives_its_units_in_order_as_blocks_of_the_size_asked_for(store, per_block, sizes):
    entries = [write(store, name, some_rows(32, seed)) for seed, name in enumerate(("a", "b"))]
    units = [entries[shard].units()[group] for shard, group in ((1, 3), (0, 0), (1, 0), (0, 3), (0, 1), (1, 3), (1, 2))]
    table = pa.table({name: [getattr(unit, name) for unit in units] for name in ("digest", "file", "offset")})
    made = list(read_units(table, store, PER_GROUP * 2 * D, 2 * D, per_block, fetch_ahead=2))
    assert [block[COLUMN].num_chunks for block in made] == sizes
    raw = b"".join(chunk.buffers()[1].to_pybytes() for block in made for chunk in block[COLUMN].chunks)
    assert raw == b"".join((store.local / u.file).read_bytes()[u.offset : u.offset + PER_GROUP * 2 * D] for u in units)


# -- damage
# --------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_among_the_rows_is_an_error_and_never_a_number(store):
    entry = write(store, F, some_rows(20))
    raw = bytearray((store.local / F).read_bytes())
    for place in (entry.offsets[0], entry.offsets[1] + 50, entry.offsets[2] + 4 * 2 * D - 1):
        bad = bytearray(raw)
        bad[place] ^= 1
        (store.local / F).write_bytes(bad)
        with pytest.raises(ShardError, match=r"s\.parquet.*checksum.*--repair"):
            read_rows(store, entry, PER_GROUP, D, "float16")


def test_a_shard_that_ends_early_or_is_gone_is_an_error(store):
    entry = write(store, F, some_rows(20))
    raw = (store.local / F).read_bytes()
    for size in (0, 1, entry.offsets[1] - 1, entry.offsets[1], entry.offsets[2] + 1, len(raw) - 1):
        (store.local / F).write_bytes(raw[:size])
        with pytest.raises(ShardError, match=r"s\.parquet.*--repair"):
            inspect_shard(store, F)
        if size < entry.offsets[2] + 4 * 2 * D:
            with pytest.raises(ShardError, match=r"s\.parquet.*ends at byte.*--repair"):
                read_rows(store, entry, PER_GROUP, D, "float16")
    store.delete(F)
    for read in (lambda: inspect_shard(store, F), lambda: read_rows(store, entry, PER_GROUP, D, "float16")):
        with pytest.raises(ShardError, match=r"s\.parquet: is missing\. .*--repair"):
            read()


def foreign(column=COLUMN, width=2 * D, metadata=None):
    schema = pa.schema([pa.field(column, pa.binary(width), nullable=False)], metadata=metadata)
    return pa.table([pa.array([b"\0" * 2 * D] * 4, type=pa.binary(width))], schema=schema)


@pytest.mark.parametrize(
    "table",
    [
        foreign(),
        foreign(metadata={"pandas": "{}"}),
        foreign(column="text", metadata={META: '{"digests": [], "positions": {}}'}),
        foreign(metadata={META: "not json"}),
        foreign(metadata={META: "[]"}),
        foreign(metadata={META: '{"dataset": "k"}'}),
        foreign(width=-1, metadata={META: '{"digests": [], "positions": {}}'}),
    ],
    ids=["bare", "other metadata", "other column", "not json", "list", "half", "strings"],
)
def test_a_parquet_file_of_someone_else_is_no_shard(store, table):
    pq.write_table(table, store.local / F)
    with pytest.raises(ShardError, match=r"s\.parquet: cannot be read as a shard .*--repair"):
        inspect_shard(store, F)
