"""The nodes of the connected cluster as they are now, and who holds what of them.

A worker group's placement group is named after its run, with the object store that each of its workers' streams may
fill, which Ray does not count: so each driver sees what all others were promised.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from dmsae_ray.cluster.nodes import NOTHING, Bundle, Node, listed
from dmsae_ray.config import Config
from dmsae_ray.labels import selected, written

GROUP = re.compile(r"[0-9a-f]+-\d+-(?P<job>[0-9a-f]+)-(?P<store_mb>\d+)MB-[0-9a-f]+/")
"""What the name of a worker group's placement group begins with, see `runs_named` and `run_name`."""
ACCELERATOR = "accelerator_type:"
"""What Ray calls the resource that a node has one of, whose accelerators are of this type."""
SHARE = 0.001
"""Of that resource, asked for by whatever has to be there: as Ray's own option does."""
STEP = 0.5
"""What others hold of a node's CPUs counts in halves, rounded down: read tasks come and go, a hundredth each."""


def runs_named(key: str, generation: int) -> str:
    """What the names of one trial's runs begin with, and no other sweep's on the same cluster.

    key: of its first chain; generation: of the lease.
    """
    import ray

    return f"{key}-{generation}-{ray.get_runtime_context().get_job_id()}-"


def run_name(runs: str, store_mb: int) -> str:
    """A name for one run of a trial, different each time. store_mb: object store that one worker may fill, MB."""
    return f"{runs}{store_mb}MB-{secrets.token_hex(4)}"


def nodes_now(runs: str | None = None) -> list[Node]:
    """The nodes of the connected cluster, but for those that will be taken away: Ray places nothing more there.

    runs: only what runs whose names begin so hold is not others'.
    """
    import ray
    from ray._private.state import available_resources_per_node, state

    free, job = available_resources_per_node(), ray.get_runtime_context().get_job_id()
    going = state.get_draining_nodes()
    ours, theirs_mb = holdings(ray.util.placement_group_table(), job, runs)
    return [
        node_of(
            node["Resources"],
            free.get(node["NodeID"], {}),
            node.get("Labels") or {},
            ours.get(node["NodeID"], NOTHING),
            theirs_mb.get(node["NodeID"], 0.0),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in going
    ]


def node_of(
    has: Mapping[str, float],
    free: Mapping[str, float],
    labels: Mapping[str, str],
    ours: Bundle = NOTHING,
    theirs_mb: float = 0.0,
) -> Node:
    """A node with these of Ray's resources, of which those are free.

    ours: what this command's worker groups hold of it; theirs_mb: object store that others' were promised, MB.
    """
    cpus, gpus, free_cpus, free_gpus = (side.get(name, 0.0) for side in (has, free) for name in ("CPU", "GPU"))
    held = max(0.0, cpus - free_cpus - ours.cpus)
    return Node(
        cpus,
        gpus,
        has.get("object_store_memory", 0.0) / 2**20,
        free_cpus,
        free_gpus,
        others=Bundle(
            STEP * math.floor((held + 1e-4) / STEP), max(0.0, round(gpus - free_gpus - ours.gpus, 4)), theirs_mb
        ),
        labels=labels,
        accelerators=frozenset(name.removeprefix(ACCELERATOR) for name in has if name.startswith(ACCELERATOR)),
    )


def holdings(
    groups: Mapping[str, Mapping[str, Any]], job: str, runs: str | None = None
) -> tuple[dict[str, Bundle], dict[str, float]]:
    """By node: what worker groups of this job hold, or of these runs alone, and MB of object store that others were
    promised.

    groups: Ray's table of placement groups.
    """
    ours: dict[str, Bundle] = {}
    theirs_mb: dict[str, float] = {}
    for group in groups.values():
        named = GROUP.match(group["name"])
        # One that lost a node waits for another place for a part of it, and holds the rest.
        if named is None or group["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        for place, resources in group["bundles"].items():
            number = group["bundles_to_node_id"][place]
            if named["job"] == job if runs is None else group["name"].startswith(runs):
                before = ours.get(number, NOTHING)
                ours[number] = Bundle(before.cpus + resources.get("CPU", 0.0), before.gpus + resources.get("GPU", 0.0))
            else:
                theirs_mb[number] = theirs_mb.get(number, 0.0) + float(named["store_mb"])
    return ours, theirs_mb


def usable(config: Config, node: Node) -> bool:
    """Whether workers and the language model may run there: cluster.label_selector and cluster.accelerator_type."""
    cluster = config.cluster
    return selected(cluster.label_selector, node.labels) and (
        cluster.accelerator_type is None or cluster.accelerator_type in node.accelerators
    )


def restrictions(config: Config) -> str:
    """What those nodes are asked for, for people; empty: nothing."""
    cluster, wanted = config.cluster, []
    if cluster.label_selector:
        wanted.append(f"cluster.label_selector {written(cluster.label_selector)}")
    if cluster.accelerator_type:
        wanted.append(f"cluster.accelerator_type {cluster.accelerator_type}")
    return listed(wanted) if wanted else ""


def placed(config: Config) -> dict[str, Any]:
    """Options of Ray's tasks and actors that run the language model: on which nodes they may."""
    cluster = config.cluster
    return ({"label_selector": dict(cluster.label_selector)} if cluster.label_selector else {}) | (
        {"accelerator_type": cluster.accelerator_type} if cluster.accelerator_type else {}
    )


def resources(config: Config, bundle: Bundle) -> dict[str, float]:
    """What Ray is asked for, for one bundle: object store it does not count."""
    wanted = {"CPU": bundle.cpus, "GPU": bundle.gpus}
    if config.cluster.accelerator_type is not None:
        wanted[ACCELERATOR + config.cluster.accelerator_type] = SHARE
    return {name: amount for name, amount in wanted.items() if amount}
