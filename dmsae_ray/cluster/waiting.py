"""What waits for room on the cluster: Ray says nothing of it, and would wait for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from dmsae_ray.cluster.nodes import READ_CPUS, Bundle, listed, plural
from dmsae_ray.cluster.present import nodes_now, resources, restrictions
from dmsae_ray.config import Config

LOOK_S, PATIENCE_S, AGAIN_S = 5.0, 60.0, 600.0
"""Between two looks; of waiting before it is told, and told again."""

Shape = tuple[tuple[str, float], ...]
"""What one thing asks one node for: (resource, amount), sorted"""


class Waits:
    """While started, says what this configuration asks the cluster for and does not get for a minute, and what would
    end that.

    The cluster knows what is asked for, not by whom: of two drivers with equal wants, both tell of it.
    """

    def __init__(
        self,
        config: Config,
        say: Callable[[str], None],
        wanted: Callable[[], Mapping[Shape, int]] | None = None,
        state: Callable[[], str] | None = None,
    ):
        """wanted: how many of each shape wait at the moment; state: the cluster in words. Not given, both ask Ray."""
        self._names, self._say, self._where = names(config), say, restrictions(config)
        self._wanted, self._state = wanted or waiting_now, state or cluster_now
        self._since: dict[Shape, float] = {}
        self._said: dict[Shape, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waits", daemon=True)

    def start(self) -> Waits:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=LOOK_S)  # bounded: a cluster that is gone does not answer

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look(time.monotonic())
            except Exception as error:
                # Only words are lost: what the cluster's end means for the work, the work itself will say.
                self._say(f"warning: the cluster does not say what waits on it ({type(error).__name__}: {error})")
                return

    def look(self, now: float) -> None:
        """One look at this time, in seconds."""
        wanted = {shape: count for shape, count in self._wanted().items() if shape in self._names}
        self._since = {shape: self._since.get(shape, now) for shape in wanted}
        for shape, since in self._since.items():
            if now - since < PATIENCE_S or now - self._said.get(shape, -AGAIN_S) < AGAIN_S:
                continue
            self._said[shape] = now
            amounts = dict(shape)
            asked, count = Bundle(amounts.get("CPU", 0.0), amounts.get("GPU", 0.0)), wanted[shape]
            where = f" with {self._where}" if self._where and amounts != {"CPU": READ_CPUS} else ""
            self._say(
                f"waiting for {now - since:.0f} s: {self._names[shape]} asks for {asked} on one node{where}, and none "
                f"has that free ({count} {'waits' if count == 1 else 'wait'}). {self._state()}. This goes on as soon "
                "as others leave that room, or another node comes (ray start --address=<head>, or an autoscaler's)"
            )


def names(config: Config) -> dict[Shape, str]:
    """What this configuration asks for, by its shape."""
    cluster = config.cluster
    worker, actor = Bundle(cluster.cpus_per_worker, cluster.gpus_per_worker), Bundle(1, config.harvest.gpus_per_actor)
    found: dict[Shape, str] = {}
    for asked, name in (
        (resources(config, worker), "a training worker"),
        (resources(config, actor), "a process for the language model (harvest, reference losses, features)"),
        ({"CPU": READ_CPUS}, "a read task of a chain's rows"),
    ):
        shape = shape_of(asked)
        found[shape] = f"{found[shape]}, or {name}," if shape in found else name
    return found


def shape_of(resources: Mapping[str, float]) -> Shape:
    """Amounts as Ray counts them, in ten thousandths; what is not asked for left out."""
    counted = {name: round(amount, 4) for name, amount in resources.items() if amount and not name.startswith("node:")}
    return tuple(sorted(counted.items()))


def waiting_now() -> dict[Shape, int]:
    """How many bundles of each shape wait on the connected cluster: of tasks, actors and placement groups of all
    drivers.
    """
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(global_worker.gcs_client)
    found: dict[Shape, int] = {}
    pending = [(entry.request, entry.count) for entry in state.pending_resource_requests]
    pending += [(request, 1) for group in state.pending_gang_resource_requests for request in group.requests]
    for request, count in pending:
        shape = shape_of(request.resources_bundle)
        found[shape] = found.get(shape, 0) + count
    return found


def cluster_now() -> str:
    """What the connected cluster has, what of it is free, and who else is at work on it."""
    import ray
    from ray._private.state import jobs

    nodes = nodes_now()
    parts = [f"{sum(n.cpus for n in nodes):g} CPUs, {max(0.0, sum(n.free_cpus for n in nodes)):.2g} free"]
    if gpus := sum(node.gpus for node in nodes):
        parts.append(f"{gpus:g} GPUs, {sum(node.free_gpus for node in nodes):.2g} free")
    own = ray.get_runtime_context().get_job_id()
    others = sum(not job["IsDead"] and job["JobID"] != own for job in jobs())
    return (
        f"The cluster ({len(nodes)} {plural('node', len(nodes))}) has {listed(parts)}; {others} other "
        f"{plural('driver', others)} at work"
    )
