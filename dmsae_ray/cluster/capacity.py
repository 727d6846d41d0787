"""What of a sweep's work a cluster holds at once, and what would be needed where it holds none of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmsae_ray.cluster.autoscaler import TooSmall, has_autoscaler
from dmsae_ray.cluster.nodes import (
    Bundle,
    Node,
    WorkerGroup,
    figure,
    fitting,
    groups_fitting,
    listed,
    misplaced,
    missing,
    plural,
)
from dmsae_ray.cluster.present import nodes_now, restrictions, usable
from dmsae_ray.cluster.waiting import Waits
from dmsae_ray.config import Config

DATA_CPUS = 1
"""Left free by a sweep's chains: for their read tasks, a hundredth each, and for what other drivers do meanwhile."""

AHEAD = 8
"""Chains at most that wait for nodes that an autoscaler brings, no more than are at work: each takes a quarter of a GB
on the command's node.
"""


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and how much of the work it holds at once."""

    cpus: float
    gpus: float
    free_cpus: float
    """that nobody held when this driver came"""
    concurrent: int
    """chains at once, or groups of them in lockstep, as many as fit beside what others hold"""
    harvest_actors: int
    local: bool
    grows: bool = False
    """whether an autoscaler brings nodes"""
    waits: Waits | None = None
    """at work while we are connected"""
    folder: Path | None = None
    """of a cluster of our own: everything that Ray keeps of it"""


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_bundle(config: Config) -> Bundle:
    """What one training worker needs on one node; its CPUs as whole ones, since Ray Data is given what is left in whole
    ones.
    """
    cluster = config.cluster
    return Bundle(math.ceil(cluster.cpus_per_worker), cluster.gpus_per_worker, cluster.object_store_mb)


def worker_group(config: Config) -> WorkerGroup:
    """What one chain needs, or several in lockstep."""
    return WorkerGroup(worker_bundle(config), config.cluster.workers, config.cluster.placement_strategy)


def actor_bundle(config: Config) -> Bundle:
    """What a harvest actor needs on one node, and a task that runs the language model."""
    return Bundle(1, config.harvest.gpus_per_actor)


def spare_cpus(config: Config, nodes: Sequence[Node]) -> float:
    """CPUs that are kept free on the nodes that may be used: none where others have them."""
    return max(0.0, DATA_CPUS - sum(node.cpus for node in nodes if not usable(config, node)))


def busy_chains(config: Config) -> int:
    """Chains whose threads keep this machine's CPUs busy."""
    return max(1, available_cpus() // (config.cluster.workers * config.train.threads))


def capacity(config: Config, nodes: Sequence[Node], chains: int, local: bool, grows: bool = False) -> Capacity:
    """How many chains fit at once. Raises TooSmall if none does, unless chains is 0; or if no harvest actor fits.

    grows: more nodes come when they are asked for.
    """
    cluster, group, actor = config.cluster, worker_group(config), actor_bundle(config)
    mine = [node for node in nodes if usable(config, node)]
    cpus, cpus_of_mine = sum(node.cpus for node in nodes), sum(node.cpus for node in mine)
    spare = spare_cpus(config, nodes)
    lacking = []
    fewest = replace(group, workers=cluster.fewest_workers)
    if chains:
        lacking = missing(mine, group.worker, fewest.workers, "training worker", spare) or misplaced(mine, fewest)
    if lacking:
        raise TooSmall(
            f"{_whose(config, nodes, mine, local)} too small for one chain. It needs {listed(lacking)}. To mend it, "
            f"{_remedy(config, mine, fewest, spare, local)}",
            fewest,
            spare,
        )
    if lacking := missing(mine, actor, 1, "harvest actor"):
        lower = "lower harvest.gpus_per_actor (0: on CPUs) or " if actor.gpus else ""
        raise TooSmall(
            f"{_whose(config, nodes, mine, local)} too small to run the language model. It needs {listed(lacking)}. To "
            f"mend it, {lower}{_larger(config, actor, 1, mine, local)}",
            WorkerGroup(actor, 1),
        )
    # Others hold it now, and may not a moment later: it decides how many begin, not whether any may.
    fits = groups_fitting([node.beside_others() for node in mine], group, spare)
    harvest = min(fitting(mine, actor), int(cpus_of_mine - spare))
    if local:
        fits = min(fits, cluster.concurrent or busy_chains(config))
        harvest = min(harvest, max(1, available_cpus() // config.harvest.threads))
    if grows:
        # What waits for its room is what the autoscaler brings nodes for.
        fits = cluster.concurrent or max(1, fits) + min(max(1, fits), AHEAD)
        harvest = max(harvest, config.harvest.actors or 1)
    return Capacity(
        cpus=cpus,
        gpus=sum(node.gpus for node in nodes),
        free_cpus=sum(node.beside_others().cpus for node in nodes),
        local=local,
        concurrent=max(1, min(fits, cluster.concurrent or fits, max(1, chains))),
        harvest_actors=max(1, min(harvest, config.harvest.actors or harvest)),
        grows=grows,
    )


def capacity_now(config: Config, chains: int) -> Capacity:
    """The same of the cluster that was joined, as it is at the moment."""
    return capacity(config, nodes_now(), chains, local=False, grows=bool(has_autoscaler()))


def concurrent_now(config: Config, chains: int) -> int:
    """How many chains there may be at once, or groups of them in lockstep, at the moment; one where none fits any more:
    what was lost may come back.
    """
    try:
        return capacity_now(config, chains).concurrent
    except TooSmall:
        return 1


def _whose(config: Config, nodes: Sequence[Node], mine: Sequence[Node], local: bool) -> str:
    if local and len(mine) == len(nodes):
        return "this machine is"
    wanted = restrictions(config)
    of_them = f", {len(mine)} of them with {wanted}" if wanted else ""
    return f"the Ray cluster ({len(nodes)} {plural('node', len(nodes))}{of_them}) is"


def _remedy(config: Config, nodes: Sequence[Node], group: WorkerGroup, spare: float, local: bool) -> str:
    """What makes a chain fit: fewer workers, smaller ones, another strategy, or more of the cluster. Names only what is
    too small.
    """
    worker, workers = group.worker, group.workers
    fewer = (count for count in range(workers - 1, 0, -1) if config.train.lanes % count == 0)
    would = next((count for count in fewer if groups_fitting(nodes, replace(group, workers=count), spare)), 0)
    named = "workers" if config.cluster.min_workers is None else "min_workers"
    ways = [f"lower cluster.{named} (now {workers}; {would} would fit)"] if would else []
    for field, smaller in (
        ("cpus_per_worker", Bundle(0, worker.gpus, worker.store_mb)),
        ("gpus_per_worker", Bundle(worker.cpus, 0, worker.store_mb)),
        ("object_store_mb", Bundle(worker.cpus, worker.gpus, 0)),
    ):
        now = getattr(config.cluster, field)
        if (field != "cpus_per_worker" or now > 1) and groups_fitting(nodes, replace(group, worker=smaller), spare):
            or_none = "; 0: train on CPUs" if field == "gpus_per_worker" else ""
            ways.append(f"lower cluster.{field} (now {figure(now)}{or_none})")
    if groups_fitting(nodes, replace(group, strategy="PACK"), spare):
        ways.append("set cluster.placement_strategy to PACK")
    return " or ".join([*ways, _larger(config, worker, workers, nodes, local)])


def _larger(config: Config, bundle: Bundle, count: int, nodes: Sequence[Node], local: bool) -> str:
    """A cluster that would do: options of `ray start` for what is too small, as one node, or as a node more."""
    cpus, gpus = math.ceil(count * bundle.cpus) + DATA_CPUS, math.ceil(count * bundle.gpus)
    store_mb = math.ceil(count * bundle.store_mb)
    options = [f"--num-cpus={cpus}"] if sum(node.cpus for node in nodes) < cpus else []
    if sum(node.store_mb for node in nodes if node.cpus) < store_mb:
        options.append(f"--object-store-memory={store_mb << 20}")
    start = f" ({' '.join(['ray start --head', *options])})"
    if wanted := restrictions(config):
        return f"add nodes with {wanted} that each have {bundle} or more (ray start --address=<head>)"
    machine = f"a machine with {gpus} {plural('GPU', gpus)} or more" if sum(node.gpus for node in nodes) < gpus else ""
    if local:
        return f"join a cluster that has more{f': on {machine}' if machine else ''}{start}"
    if len(nodes) > 1:
        return f"add nodes that each have {bundle} or more (ray start --address=<head>)"
    if machine or not options:
        return f"start Ray on {machine or 'a larger machine'}{start}, or add nodes"
    return f"start Ray with more{start}, or add nodes"
