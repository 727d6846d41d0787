"""Worker groups on nodes that differ: by strategy, label, accelerator, and beside what others hold."""

import itertools
import random

import pytest

from dmsae_ray.cluster.capacity import capacity, concurrent_now, worker_group
from dmsae_ray.cluster.nodes import Bundle, Node, WorkerGroup, fitting, groups_fitting, misplaced, slots
from dmsae_ray.cluster.present import GROUP, holdings, node_of, placed, resources, run_name
from dmsae_ray.cluster.waiting import names, shape_of
from dmsae_ray.config import Config

PLENTY = 1 << 20


def at_once(config: Config, nodes: list[Node], **more) -> int:
    return capacity(config, nodes, chains=99, local=False, **more).concurrent


def refusal(config: Config, nodes: list[Node]) -> str:
    with pytest.raises(ValueError) as refused:
        capacity(config, nodes, chains=9, local=False)
    return str(refused.value)


def most_apart(held: list[int], workers: int) -> int:
    """Plain reference for STRICT_SPREAD: the most groups of any way to place them."""
    found = [0]
    for nodes in itertools.combinations(range(len(held)), workers):
        if all(held[node] for node in nodes):
            left = [count - (node in nodes) for node, count in enumerate(held)]
            found.append(1 + most_apart(left, workers))
    return max(found)


def test_as_many_groups_fit_as_their_strategy_allows():
    draw = random.Random(0)
    for _ in range(150):
        nodes = [Node(draw.randint(0, 4), 0, PLENTY) for _ in range(draw.randint(1, 4))]
        workers, bundle = draw.choice((1, 2, 3)), Bundle(1, 0, 64)
        held = [slots(node, bundle) for node in nodes]
        for strategy, most in (
            ("PACK", sum(held) // workers),
            ("SPREAD", sum(held) // workers),
            ("STRICT_PACK", sum(count // workers for count in held)),
            ("STRICT_SPREAD", most_apart(held, workers)),
        ):
            group = WorkerGroup(bundle, workers, strategy)
            assert groups_fitting(nodes, group) == most, (held, group)
            assert bool(misplaced(nodes, group)) == (most == 0)
            assert groups_fitting(nodes, group, spare_cpus=1) <= (fitting(nodes, bundle) - 1) / workers or most == 0


def test_a_strategy_that_no_node_allows_is_told_with_what_would_do():
    apart, together = [Node(3, 0, PLENTY)] * 3, [Node(9, 0, PLENTY)]
    strict = {"workers": 4, "placement_strategy": "STRICT_PACK"}
    said = refusal(Config(cluster=strict), apart)
    assert "one node for all 4 training workers (cluster.placement_strategy STRICT_PACK)" in said
    assert "hold 3 of them at most" in said and "set cluster.placement_strategy to PACK" in said
    assert "lower cluster.workers (now 4; 2 would fit)" in said
    assert at_once(Config(cluster=strict), together) == 2
    spread = {"workers": 2, "placement_strategy": "STRICT_SPREAD"}
    said = refusal(Config(cluster=spread), together)
    assert "2 nodes for as many training workers" in said and "1 of its nodes has that" in said
    assert at_once(Config(cluster=spread), apart) == 4


def test_a_chain_may_begin_with_its_fewest_workers():
    """As many begin as fit whole; one where that is none."""
    cluster = {"workers": 4, "min_workers": 2, "gpus_per_worker": 1}
    assert at_once(Config(cluster=cluster), [Node(99, 2, PLENTY)]) == 1
    assert at_once(Config(cluster=cluster), [Node(99, 15, PLENTY)]) == 3
    assert "lower cluster.min_workers (now 2; 1 would fit)" in refusal(Config(cluster=cluster), [Node(99, 1, PLENTY)])
    for few in (5, 3):  # train.lanes 8 are not dealt to three
        with pytest.raises(
            ValueError, match=f"cluster.min_workers {few}: at most cluster.workers 4, and train.lanes 8"
        ):
            Config(cluster=cluster | {"min_workers": few})


def test_only_nodes_with_the_label_and_the_accelerator_count():
    nodes = [
        Node(8, 2, PLENTY, labels={"pool": "a"}, accelerators=frozenset({"A100"})),
        Node(8, 4, PLENTY, labels={"pool": "b"}, accelerators=frozenset({"A100"})),
        Node(8, 8, PLENTY, labels={"pool": "a"}, accelerators=frozenset({"H100"})),
    ]

    def config(**cluster) -> Config:
        return Config(cluster={"gpus_per_worker": 1, **cluster}, harvest={"gpus_per_actor": 1})

    for cluster, count in (
        ({}, 14),
        ({"label_selector": {"pool": "a"}}, 10),
        ({"accelerator_type": "A100"}, 6),
        ({"accelerator_type": "A100", "label_selector": {"pool": "!b"}}, 2),
    ):
        found = capacity(config(**cluster), nodes, chains=99, local=False)
        assert found.concurrent == found.harvest_actors == count
        assert found.cpus == 24
    said = refusal(config(label_selector={"pool": "c"}), nodes)
    assert "add nodes with cluster.label_selector pool=c that each have 1 CPU" in said
    assert "the Ray cluster (3 nodes, 0 of them with cluster.label_selector pool=c) is too small" in said
    assert "0 of them with cluster.accelerator_type V100" in refusal(config(accelerator_type="V100"), nodes)


def test_the_spare_cpu_may_be_on_a_node_that_is_not_selected():
    config = Config(cluster={"label_selector": {"pool": "a"}})
    pool = Node(2, 0, PLENTY, labels={"pool": "a"})
    assert at_once(config, [pool]) == 1
    assert at_once(config, [pool, Node(1, 0, 0)]) == 2


def test_what_others_hold_counts_where_it_is_held():
    config = Config(cluster={"workers": 2, "gpus_per_worker": 1, "placement_strategy": "STRICT_PACK"})
    free = [Node(8, 4, PLENTY), Node(8, 4, PLENTY)]
    assert at_once(config, free) == 4
    assert at_once(config, [Node(8, 4, PLENTY, others=Bundle(0, 3)), free[1]]) == 2
    assert at_once(config, [Node(8, 4, PLENTY, others=Bundle(7)), free[1]]) == 2
    assert at_once(config, [Node(8, 4, 2100, others=Bundle(0, 0, 1100)), free[1]]) == 2
    # Held by others now is no reason to refuse: one begins, and waits.
    assert at_once(config, [Node(8, 4, PLENTY, others=Bundle(8, 4))]) == 1


def group(job: str, nodes: list[str], state: str = "CREATED", store_mb: int = 512) -> dict:
    return {
        "name": f"0123456789ab-3-{job}-{store_mb}MB-0f/1e",
        "state": state,
        "bundles": {place: {"CPU": 0.5, "GPU": 1.0} for place in range(len(nodes))},
        "bundles_to_node_id": dict(enumerate(nodes)),
    }


def test_worker_groups_are_known_by_their_names():
    assert GROUP.match(run_name("0123456789ab-3-01000000-", 512) + "/1e")
    groups = {
        "1": group("01", ["x", "x", "y"]),
        "2": group("02", ["y", "z"], store_mb=700),
        "3": group("02", [""], state="PENDING"),
        "4": group("01", ["z"]) | {"name": "somebody else's"},
    }
    assert holdings(groups, "01") == ({"x": Bundle(1, 2), "y": Bundle(0.5, 1)}, {"y": 700, "z": 700})
    another = groups | {"5": group("02", ["z"], store_mb=300)}
    ours, theirs_mb = holdings(another, "02", "0123456789ab-3-02-300MB")
    assert ours == {"z": Bundle(0.5, 1)} and theirs_mb == {"x": 1024, "y": 512 + 700, "z": 700}


def test_a_node_tells_what_others_hold_and_not_what_read_tasks_do():
    has = {"CPU": 8.0, "GPU": 4.0, "object_store_memory": 2**30, "accelerator_type:A100": 1.0}
    node = node_of(has, {"CPU": 3.93, "GPU": 1.5}, {"pool": "a"}, ours=Bundle(2.5, 1), theirs_mb=700)
    assert node.others == Bundle(1.5, 1.5, 700) and node.accelerators == {"A100"} and node.store_mb == 1024
    assert node_of(has, has, {}).others == Bundle(0)


def test_an_autoscaler_is_given_something_to_do():
    """One that waits for each at work; as many as were asked for by number."""
    nodes = [Node(5, 0, PLENTY)]
    assert at_once(Config(), nodes) == 4 and at_once(Config(), nodes, grows=True) == 8
    assert at_once(Config(cluster={"concurrent": 64}), nodes) == 4
    assert at_once(Config(cluster={"concurrent": 64}), nodes, grows=True) == 64
    assert at_once(Config(), [Node(41, 0, PLENTY)], grows=True) == 40 + 8
    assert at_once(Config(), [Node(5, 0, PLENTY, others=Bundle(5))], grows=True) == 2
    assert capacity(Config(harvest={"actors": 9}), nodes, 4, local=False, grows=True).harvest_actors == 9


def test_nodes_that_join_and_leave_are_counted_when_asked(monkeypatch):
    nodes = [Node(2, 0, PLENTY)]
    monkeypatch.setattr("dmsae_ray.cluster.capacity.nodes_now", lambda: nodes)
    monkeypatch.setattr("dmsae_ray.cluster.capacity.has_autoscaler", lambda: False)
    assert concurrent_now(Config(), 99) == 1
    nodes.append(Node(6, 0, PLENTY))
    assert concurrent_now(Config(), 99) == 7 and concurrent_now(Config(), 3) == 3
    nodes.clear()
    assert concurrent_now(Config(), 99) == 1


def test_where_processes_may_run_is_asked_of_ray_and_told_of_when_it_waits():
    config = Config(
        cluster={"gpus_per_worker": 1, "label_selector": {"pool": "a"}, "accelerator_type": "A100", "workers": 2}
    )
    assert placed(config) == {"label_selector": {"pool": "a"}, "accelerator_type": "A100"} and placed(Config()) == {}
    asked = resources(config, worker_group(config).worker)
    assert asked == {"CPU": 1, "GPU": 1, "accelerator_type:A100": 0.001}
    assert shape_of({"CPU": 0.5, "GPU": 1, "accelerator_type:A100": 0.001}) in names(config)
