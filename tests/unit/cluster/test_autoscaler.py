"""Waiting for nodes: when, how long, what is said and asked for. With Ray's own: tests/faults/test_nodes_join.py."""

import pytest

from dmsae_ray.cluster import autoscaler
from dmsae_ray.cluster.autoscaler import REPORTS_S, SETTLES_S, TooSmall, wait_for_nodes
from dmsae_ray.cluster.capacity import capacity
from dmsae_ray.cluster.nodes import Bundle, Node, WorkerGroup
from dmsae_ray.config import Config

CONFIG = {"gpus_per_worker": 1}


class Cluster:
    """Made nodes that come at set times, on a clock that runs only while it is waited for."""

    def __init__(self, monkeypatch, scaled: bool | None, granted: float = float("inf")):
        """scaled: what the cluster says of an autoscaler; granted: when there is room for what it is asked for, s."""
        self.now, self.nodes, self.coming, self.said, self.asked = 0.0, [], {}, [], []
        outer = self

        class Asked:
            def __init__(self, config):
                pass

            def granted(self, error):
                outer.asked.append(error.lacks)
                return outer.now >= granted

            def withdraw(self):
                outer.asked.append(None)

        monkeypatch.setattr(autoscaler, "has_autoscaler", lambda: scaled)
        monkeypatch.setattr(autoscaler, "Asked", Asked)
        monkeypatch.setattr(autoscaler.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(autoscaler.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        assert self.now < 1e5, "waits without end"
        self.now += seconds
        self.nodes = [node for at, node in self.coming.items() if at <= self.now]

    def wait(self, **cluster) -> int:
        config = Config(cluster=CONFIG | cluster)
        return wait_for_nodes(config, lambda: capacity(config, self.nodes, 9, local=False), self.said.append).concurrent


def test_a_fixed_cluster_that_is_too_small_ends_at_once(monkeypatch):
    cluster = Cluster(monkeypatch, scaled=False)
    with pytest.raises(ValueError, match=r"too small for one chain. It needs 2 CPUs .* 1 GPU "):
        cluster.wait()
    assert cluster.now == 0 and not cluster.said


def test_a_head_that_does_not_say_yet_is_asked_again(monkeypatch):
    cluster = Cluster(monkeypatch, scaled=None)
    with pytest.raises(TooSmall):
        cluster.wait()
    assert REPORTS_S <= cluster.now < REPORTS_S + 5 and not cluster.said


def test_where_there_is_an_autoscaler_nodes_are_asked_for_and_waited_for(monkeypatch):
    cluster = Cluster(monkeypatch, scaled=True)
    cluster.coming = {3000.0: Node(8, 0, 1 << 20), 9000.0: Node(8, 2, 1 << 20)}
    assert cluster.wait() == 2
    assert 9000 <= cluster.now < 9010
    assert set(cluster.asked[:-1]) == {WorkerGroup(Bundle(1, 1, 512), 1)} and cluster.asked[-1] is None
    assert (
        "waiting for nodes (without end: cluster.wait_for_nodes; its autoscaler was asked for them)" in cluster.said[0]
    )
    assert "It needs 2 CPUs" in cluster.said[0] and "It needs 1 GPU" in cluster.said[-1]
    assert 9000 / 600 - 1 <= len(cluster.said) <= 9000 / 600 + 1


def test_a_limit_holds_with_and_without_an_autoscaler(monkeypatch):
    for scaled in (True, False, None):
        cluster = Cluster(monkeypatch, scaled)
        with pytest.raises(TooSmall, match=r"\(waited 5 minutes for nodes: cluster.wait_for_nodes\)"):
            cluster.wait(wait_for_nodes=5)
        assert 300 <= cluster.now < 310 and "5 minutes at most" in cluster.said[0]
        assert ("it has no autoscaler" in cluster.said[0]) == (scaled is not True)
    cluster = Cluster(monkeypatch, scaled=True)
    with pytest.raises(TooSmall, match="To mend it, .*$") as refused:
        cluster.wait(wait_for_nodes=0)
    assert cluster.now == 0 and "waited" not in str(refused.value)


def test_nodes_that_come_by_hand_end_the_wait(monkeypatch):
    cluster = Cluster(monkeypatch, scaled=False)
    cluster.coming = {60.0: Node(8, 3, 1 << 20)}
    assert cluster.wait(wait_for_nodes=5) == 3 and cluster.now < 70


def test_nodes_that_came_as_asked_for_and_do_not_do_end_the_wait(monkeypatch):
    """Object store is nothing that Ray can be asked for."""
    cluster = Cluster(monkeypatch, scaled=True, granted=100.0)
    cluster.coming = {90.0: Node(8, 2, 300)}
    with pytest.raises(TooSmall, match=r"512 MB of object store .* it has 300\..*The autoscaler brought what Ray was"):
        cluster.wait()
    assert 100 + SETTLES_S <= cluster.now < 120 + SETTLES_S
