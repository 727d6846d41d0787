"""The order of training rows, and the digest that says which were given: both the same for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import D, make_dataset

from dmsae_ray.activations.order import Order
from dmsae_ray.activations.stream import MASK, Pick

orders = st.builds(
    lambda units, lanes, lane_rows, batches, seed, cycle: Order(
        units + lanes, batches * lane_rows, lanes * lane_rows, lanes, seed, cycle
    ),
    st.integers(0, 30),
    st.sampled_from([1, 2, 4, 8, 12]),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, 3),
)


@settings(deadline=None)
@given(orders, st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_the_global_batch_is_the_same_for_any_number_of_workers(order, world, step):
    if order.lanes % world:
        return
    round_, row = order.position(step)
    units, n = order.units(round_), order.lane_rows

    def taken(lane):
        return units[lane] * order.unit_rows + order.rows(round_, units[lane])[row : row + n]

    alone_B = np.concatenate([taken(lane) for lane in range(order.lanes)])
    assert len(set(alone_B)) == order.batch
    shared_B = np.full_like(alone_B, -1)
    for rank in range(world):
        shared_B[order.token_index(rank, world)] = np.concatenate([taken(lane) for lane in order.lanes_of(rank, world)])
    assert (alone_B == shared_B).all()


@settings(deadline=None)
@given(orders, st.integers(0, 10_000))
def test_a_position_is_one_step_s_and_a_step_s_is_one(order, step):
    round_, row = order.position(step)
    assert order.step_at(round_, row) == step
    assert order.position(step + 1) == (
        (round_, row + order.lane_rows) if row + order.lane_rows < order.unit_rows else (round_ + 1, 0)
    )


@settings(deadline=None)
@given(orders, st.integers(0, 50))
def test_no_batch_starts_anywhere_else(order, round_):
    starts = [
        row
        for row in range(-order.unit_rows, 3 * order.unit_rows)
        if 0 <= row < order.unit_rows and row % order.lane_rows == 0
    ]
    for row in range(-order.unit_rows, 3 * order.unit_rows):
        if row in starts:
            assert order.position(order.step_at(round_, row)) == (round_, row)
        else:
            with pytest.raises(ValueError, match=rf"no batch starts at row {row} .*gives {order.lane_rows} rows"):
                order.step_at(round_, row)


def test_a_pass_takes_every_row_at_most_once_and_passes_differ():
    order = Order(n_units=17, unit_rows=16, batch=32, lanes=8, data_seed=3, cycle=1)
    passes = []
    for pass_ in range(2):
        rows = []
        for round_ in range(pass_ * order.rounds_per_pass, (pass_ + 1) * order.rounds_per_pass):
            for unit in order.units(round_):
                rows += (unit * 16 + order.rows(round_, unit)).tolist()
        assert len(rows) == len(set(rows)) == 16 * 16
        passes.append(rows)
    assert passes[0] != passes[1]
    assert order.rows(0, 5).tolist() != order.rows(order.rounds_per_pass, 5).tolist(), "rows are permuted anew as well"


def test_cycles_and_data_seeds_give_other_orders():
    def first(seed, cycle):
        order = Order(n_units=64, unit_rows=16, batch=32, lanes=8, data_seed=seed, cycle=cycle)
        return order.units(0).tolist(), order.rows(0, 5).tolist()

    assert first(0, 0) == first(0, 0)
    different = [first(0, 0), first(0, 1), first(1, 0), first(1, 1)]
    assert len({str(units) for units, _ in different}) == len({str(rows) for _, rows in different}) == 4


# -- the digest
# ----------------------------------------------------------------------------------------------------------

PER_GROUP, SHARDS, LANES, BATCH = 24, 3, 4, 32  # 8 rows of a lane in a batch, 3 batches in a round


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The units of a dataset, read from disk, and an order over them of two rounds a pass."""
    dataset = make_dataset(
        tmp_path_factory.mktemp("order") / "d", shards=SHARDS, rows=3 * PER_GROUP, per_group=PER_GROUP
    )
    units = [(dataset.store.local / u.file).read_bytes()[u.offset :][: PER_GROUP * 2 * D] for u in dataset.units()]
    return units, Order(len(units), PER_GROUP, BATCH, LANES, data_seed=5, cycle=2)


def given_by(data, rank, world, start, stop) -> int:
    """Digest of one rank's stream over the batches start .. stop - 1, by what the stream gathers and hashes with."""
    units, order = data
    out_ND, total = torch.empty(order.lane_rows, D, dtype=torch.int16), 0
    for step in range(start, stop):
        round_, row = order.position(step)
        for lane in order.lanes_of(rank, world):
            unit = order.units(round_)[lane]
            view_ND = torch.frombuffer(bytearray(units[unit]), dtype=torch.int16).view(PER_GROUP, D)
            take_N = torch.from_numpy(order.rows(round_, unit))[row : row + order.lane_rows]
            total += Pick(step * order.lanes + lane, "file", view_ND, take_N).gather(out_ND)
    return total & MASK


def expected(data, steps, swap=None) -> int:
    """The same of rows [0, steps * BATCH) of the order, laid out as one list of single rows. swap: two of them change
    places.
    """
    units, order = data
    rows = []
    for round_ in range(-(-steps * BATCH // (LANES * PER_GROUP))):
        dealt = [
            [units[unit][2 * D * row :][: 2 * D] for row in order.rows(round_, unit)] for unit in order.units(round_)
        ]
        for first in range(0, PER_GROUP, BATCH // LANES):
            rows += [row for lane in dealt for row in lane[first : first + BATCH // LANES]]
    if swap:
        rows[swap[0]], rows[swap[1]] = rows[swap[1]], rows[swap[0]]
    lanes = [b"".join(rows[first : first + BATCH // LANES]) for first in range(0, steps * BATCH, BATCH // LANES)]
    return sum(xxhash.xxh3_64(lane, seed=number).intdigest() for number, lane in enumerate(lanes)) % 2**64


@pytest.mark.parametrize("steps", [1, 3, 4, 13])
def test_the_sum_of_the_ranks_digests_is_that_of_the_order_s_rows(data, steps):
    for world in (1, 2, 4):
        assert sum(given_by(data, rank, world, 0, steps) for rank in range(world)) & MASK == expected(data, steps), (
            world
        )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 13), st.sampled_from([1, 2, 4])), max_size=4))
def test_a_stopped_run_that_goes_on_with_other_workers_has_the_same_digest(data, stops):
    total, first = 0, 0
    for stop, world in [*sorted(stops), (13, 1)]:
        total += sum(given_by(data, rank, world, first, stop) for rank in range(world))
        first = stop
    assert total & MASK == expected(data, 13)


def test_the_digest_tells_rows_batches_and_lanes_apart(data):
    whole = expected(data, 13)
    assert expected(data, 12) != whole
    # Two rows of a lane, of two lanes of a batch, of two batches: other rows were given, or elsewhere.
    for swap in ((0, 1), (0, 8), (0, BATCH)):
        assert expected(data, 13, swap) != whole, swap
    read_twice = whole + given_by(data, 0, 1, 3, 4)
    assert read_twice & MASK != whole
