"""Many streams on one machine: none starves another, and each keeps to its share of the object store."""

import threading
import time

import pytest
import ray
import torch
from ray_here import ray_here

from dmsae_ray.activations.dataset import ActivationDataset, Manifest, statistics_of
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardWriter
from dmsae_ray.activations.stream import Stream, StreamLimits
from dmsae_ray.store import Store

D, PER_GROUP, SHARDS, LANES = 256, 2048, 6, 8
STREAMS = 4
BUDGET_MB = 32


@pytest.fixture(scope="module")
def cluster():
    # One CPU for each stream's consumer and one for all that read, as a sweep leaves it to Ray Data.
    with ray_here(cpus=STREAMS + 1, object_store_memory=1 << 30, include_dashboard=False):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ActivationDataset:
    """100 MB of random rows: several times what a stream may hold at once."""
    store, nothing = Store(tmp_path_factory.mktemp("rows")), {"bos": 0, "padding": 0, "outlier": 0, "unused": 0}
    generator, writer, entries = torch.Generator().manual_seed(0), ShardWriter(), []
    for name in [*(f"train-{i:05d}" for i in range(SHARDS)), "calibration"]:
        rows_ND = torch.randn(16 * PER_GROUP, D, generator=generator).half()
        entries.append(writer.write(store, f"shards/{name}.parquet", rows_ND, PER_GROUP, {"dataset": "key"}, nothing))
    Manifest(
        key="key",
        model="",
        model_fingerprint="",
        corpus_fingerprint="",
        hook="",
        d=D,
        dtype="float16",
        context=8,
        seed=0,
        rows_per_group=PER_GROUP,
        positions=nothing,
        shards=entries[:-1],
        calibration=entries[-1],
        fields={},
        **statistics_of(rows_ND),
    ).save(store)
    return ActivationDataset(store)


def order_of(dataset: ActivationDataset, data_seed: int) -> Order:
    return Order(
        n_units=len(dataset.units()), unit_rows=PER_GROUP, batch=1024, lanes=LANES, data_seed=data_seed, cycle=0
    )


def consume(place: str, data_seed: int) -> tuple[int, int, float]:
    """(batches, digest, seconds to the first batch) of one stream's pass; waits for the others before it begins."""
    dataset = ActivationDataset(place)
    stream, order = (
        Stream(dataset, dataset.units(), 0, 1, StreamLimits(BUDGET_MB)),
        order_of(ActivationDataset(place), data_seed),
    )
    start, first, count = time.monotonic(), None, 0
    batches = stream.open(order, 0, order.rounds_per_pass * order.batches_per_round)
    for _ in batches:
        first = time.monotonic() - start if first is None else first
        count += 1
    return count, batches.digest, first


def test_streams_that_leave_one_cpu_to_reading_all_get_their_rows(cluster, dataset):
    tasks = [ray.remote(num_cpus=1)(consume).remote(dataset.store.url, seed) for seed in range(STREAMS)]
    found = ray.get(tasks, timeout=1200)
    order = order_of(dataset, 0)
    assert [count for count, _, _ in found] == [order.rounds_per_pass * order.batches_per_round] * STREAMS
    # Other seeds, other batches; and a stream among many gives what it gives alone.
    assert len({digest for _, digest, _ in found}) == STREAMS
    assert found[2][1] == consume(dataset.store.url, 2)[1]


def test_a_stream_keeps_to_its_share_of_the_object_store(cluster, dataset):
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()

    def used_mb() -> float:
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
        return stats.object_store_bytes_used / 2**20

    end = time.monotonic() + 30
    while (before := used_mb()) > 4 and time.monotonic() < end:  # what earlier streams had is let go
        time.sleep(0.2)
    seen, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            seen.append(used_mb() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    order = order_of(dataset, 0)
    for _ in Stream(dataset, dataset.units(), 0, 1, StreamLimits(BUDGET_MB)).open(
        order, 0, order.rounds_per_pass * order.batches_per_round
    ):
        time.sleep(0.02)  # slower than reading, so that all that can wait does
    stop.set()
    watcher.join()
    assert 8 < max(seen) <= BUDGET_MB, max(seen)
