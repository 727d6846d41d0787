"""Ranks whose process group works on their device alone, as NCCL's does: no tensor from the CPU is given to it."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist
from thread_ranks import on_ranks
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend `fake`)

from dmsae_ray.evaluation.measure import Tally
from dmsae_ray.sae.ranks import collective
from dmsae_ray.sae.ranks.collective import TorchCollective, gather_objects, gather_ragged, meet


@pytest.fixture
def device_only():
    """A process group of two with a backend for one device, PyTorch's meta device, and none for the CPU. It says
    nothing to anybody.
    """
    dist.init_process_group("meta:fake", store=dist.HashStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class OnMeta(TorchCollective):
    """Tensors on the meta device hold no numbers, so what comes back is made up."""

    def __init__(self):
        super().__init__("meta")

    @staticmethod
    def _back(result, like):
        assert result.device.type == "meta" and result.shape == like.shape
        return like


def test_the_group_refuses_tensors_of_the_cpu(device_only):
    """What the others below would meet if they gave it any."""
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(2))


def test_sums_of_an_evaluation_reach_the_group_s_device(device_only):
    tally = Tally()
    tally.add(rows=3, x=torch.ones(4), error=torch.ones(2))
    tally.reduce(OnMeta())
    assert sorted(tally.sums) == ["error", "rows", "x"] and all(
        value.device.type == "cpu" for value in tally.sums.values()
    )


def test_everything_else_that_ranks_say_does_too(device_only):
    comm = OnMeta()
    assert comm.all_reduce_max(torch.tensor([1.0])).tolist() == [1.0]
    assert [part.tolist() for part in comm.all_gather(torch.tensor([5]))] == [[5], [5]]
    assert [part.tolist() for part in gather_ragged(comm, torch.arange(3))] == [[0, 1, 2]] * 2
    assert gather_objects(comm, ["shards/a b.parquet"]) == [["shards/a b.parquet"]] * 2


def test_every_rank_has_every_rank_s_values():
    values = [[], ["ä", 1], [{"b": None}]]
    assert on_ranks(3, lambda comm: gather_objects(comm, values[comm.rank])) == [values] * 3


def test_ranks_wait_for_one_that_takes_long(device_only, monkeypatch):
    """Longer than the store's own limit, which a collective's wait would end at."""
    store, seen = dist.HashStore(), []
    store.set_timeout(datetime.timedelta(milliseconds=20))
    monkeypatch.setattr(collective, "MEET_S", 0.001)

    def wait(name):
        meet(store, name, 2)
        seen.append(name)

    early = threading.Thread(target=wait, args=("first",))
    early.start()
    time.sleep(0.1)
    assert seen == [] and early.is_alive()
    wait("first")
    early.join()
    assert seen == ["first", "first"]
    # A later meeting is another one.
    later = threading.Thread(target=wait, args=("second",))
    later.start()
    time.sleep(0.02)
    assert len(seen) == 2
    wait("second")
    later.join()
