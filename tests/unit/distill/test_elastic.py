"""With how many workers a group begins, and when it grows. With nodes that go: tests/faults/test_nodes_join.py."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from dmsae_ray.cluster.nodes import Bundle, Node
from dmsae_ray.config import Config
from dmsae_ray.distill import elastic
from dmsae_ray.distill.elastic import Elastic, most_workers, numbers


@pytest.mark.parametrize(
    "workers, least, lanes, allowed",
    [(1, None, 8, [1]), (4, None, 8, [4]), (4, 1, 8, [4, 2, 1]), (8, 2, 8, [8, 4, 2]), (6, 1, 12, [6, 4, 3, 2, 1])],
)
def test_numbers_of_workers_share_the_lanes_evenly(workers, least, lanes, allowed):
    config = Config(
        cluster={"workers": workers, "min_workers": least},
        train={"lanes": lanes, "batch": 48 * lanes},
        harvest={"rows_per_group": 48 * 16, "rows_per_shard": 48 * 16},
    )
    assert numbers(config) == allowed


def test_as_many_as_there_is_room_for_beside_others(monkeypatch):
    config = Config(cluster={"workers": 4, "min_workers": 1, "gpus_per_worker": 1, "label_selector": {"pool": "a"}})
    nodes, asked = [], []
    monkeypatch.setattr(elastic, "nodes_now", lambda runs: asked.append(runs) or nodes)

    def node(gpus: float, held: float = 0, pool: str = "a") -> Node:
        return Node(8, gpus, 1 << 20, others=Bundle(0, held), labels={"pool": pool})

    for there, most in (
        ([node(9)], 4),
        ([node(2), node(2, held=1), node(9, pool="b")], 2),
        ([node(4, held=3)], 1),
        ([node(4, held=4)], None),
    ):
        nodes[:] = there
        assert most_workers(config, "run-") == most
    assert set(asked) == {"run-"}


def test_a_group_grows_after_a_checkpoint_alone(monkeypatch):
    monkeypatch.setattr(Elastic, "_maybe_send_resource_request", lambda self: None)
    room, saved = [2], [[None]]
    policy = Elastic(ScalingConfig(num_workers=4), [4, 2, 1], lambda: room[0], lambda: saved[0] and list(saved[0]))

    def begins() -> int:
        decision = policy.make_decision_for_non_running_worker_group()
        assert isinstance(decision, ResizeDecision) and decision.resources_per_worker == {"CPU": 1}
        return decision.num_workers

    def goes_on(workers: int) -> int:
        decision = policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=workers), None)
        return workers if isinstance(decision, NoopDecision) else decision.num_workers

    assert begins() == 2 and goes_on(2) == 2
    room[0] = 4
    assert goes_on(2) == 2  # nothing saved since: what was trained would be trained twice
    saved[0] = [[0, 8]]
    assert goes_on(2) == 4
    saved[0] = None  # evaluation would be lost
    assert goes_on(2) == 2
    saved[0] = [[0, 16]]
    assert goes_on(4) == 4
    room[0] = 1  # nodes that go end the group by themselves
    assert goes_on(2) == 2 and begins() == 1
    room[0] = None
    assert begins() == 1  # and waits for it
