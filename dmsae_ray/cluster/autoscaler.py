"""A cluster that may grow: whether it has an autoscaler, and waiting until it holds what the work needs.

An autoscaler starts nodes for what is asked for and not had, so what is lacking is asked for while it is waited for: as
placement groups, which cost no process.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dmsae_ray.cluster.nodes import WorkerGroup
from dmsae_ray.cluster.waiting import AGAIN_S, LOOK_S
from dmsae_ray.config import Config

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Found = TypeVar("Found")

NO_TYPE = re.compile(r"node_[0-9a-f]{8,}")
"""What Ray's monitor of a fixed cluster calls the types of its nodes: each has one of its own."""
REPORTS_S = 15.0
"""A head that has just started has not told yet whether it has an autoscaler."""
SETTLES_S = 30.0
"""After all that was asked for is there: for nodes to be known as they are."""


class TooSmall(ValueError):
    """The nodes that are there do not hold what the work needs."""

    def __init__(self, said: str, lacks: WorkerGroup, spare_cpus: float = 0.0):
        """lacks: what does not fit; spare_cpus: kept free beside it."""
        super().__init__(said)
        self.lacks, self.spare_cpus = lacks, spare_cpus


def has_autoscaler() -> bool | None:
    """Whether nodes come to the connected cluster when they are asked for; None: it does not say.

    Of both kinds that Ray has: `ray up` and cluster launchers, and KubeRay's beside the head.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = global_worker.gcs_client
    if is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        reply = GetClusterStatusReply.FromString(client.get_cluster_status())
        if not reply.HasField("autoscaling_state"):
            return None
        # What an autoscaler calls the machines that it started; Ray's monitor of a fixed cluster calls them nothing.
        return any(node.instance_id for node in reply.cluster_resource_state.node_states)
    told = client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), namespace=None)
    types = (json.loads(told).get("autoscaler_report") or {}).get("active_nodes") if told else None
    return None if types is None else any(not NO_TYPE.fullmatch(name) for name in types)


def wait_for_nodes(config: Config, look: Callable[[], Found], say: Callable[[str], None]) -> Found:
    """What `look` gives as soon as it no longer raises TooSmall.

    Raises it where that cannot be waited for: after `cluster.wait_for_nodes`, by default at once on a cluster without
    an autoscaler; and where all that was asked for came, and does not do.
    """
    began, limit, asked, came, said = time.monotonic(), config.cluster.wait_for_nodes, Asked(config), None, None
    scaled: bool | None = None
    try:
        while True:
            try:
                return look()
            except TooSmall as error:
                waited, scaled = time.monotonic() - began, scaled or has_autoscaler()
                if limit is not None and waited >= 60 * limit:
                    after = f" (waited {limit:g} minutes for nodes: cluster.wait_for_nodes)" if limit else ""
                    raise TooSmall(f"{error}{after}", error.lacks) from None
                if limit is None and (scaled is False or (scaled is None and waited >= REPORTS_S)):
                    raise
                if scaled:
                    came = (came or time.monotonic()) if asked.granted(error) else None
                    if came is not None and time.monotonic() - came > SETTLES_S:
                        raise TooSmall(f"{error}. The autoscaler brought what Ray was asked for", error.lacks) from None
                if (scaled or limit is not None) and (said is None or time.monotonic() - said >= AGAIN_S):
                    said = time.monotonic()
                    until = f"{limit:g} minutes at most" if limit is not None else "without end"
                    whom = "its autoscaler was asked for them" if scaled else "it has no autoscaler"
                    say(f"waiting for nodes ({until}: cluster.wait_for_nodes; {whom}): {error}")
                time.sleep(1.0 if scaled is None else LOOK_S)
    finally:
        asked.withdraw()


class Asked:
    """Placement groups that stand for what is lacking, so that an autoscaler brings nodes for it."""

    def __init__(self, config: Config):
        self.config = config
        self.groups: list[PlacementGroup] = []
        self.lacks: WorkerGroup | None = None

    def granted(self, error: TooSmall) -> bool:
        """Whether there is room for all that is asked for; asks for what this error lacks."""
        if error.lacks != self.lacks:
            self.withdraw()
            self._ask(error.lacks, error.spare_cpus)
        return all(group.wait(0) for group in self.groups)

    def _ask(self, group: WorkerGroup, spare_cpus: float) -> None:
        from ray.util.placement_group import placement_group

        from dmsae_ray.cluster.present import resources, run_name, runs_named

        # Named as our worker groups are: what they hold is no one else's.
        name = run_name(runs_named("0", 0), 0) + "/asked"
        cluster, self.lacks = self.config.cluster, group
        bundles = [resources(self.config, group.worker)] * group.workers
        selectors = [dict(cluster.label_selector)] * group.workers if cluster.label_selector else None
        self.groups.append(placement_group(bundles, group.strategy, name=name, bundle_label_selector=selectors))
        if spare_cpus:
            self.groups.append(placement_group([{"CPU": spare_cpus}], name=f"{name}-spare"))

    def withdraw(self) -> None:
        from ray.util.placement_group import remove_placement_group

        for group in self.groups:
            remove_placement_group(group)
        self.groups, self.lacks = [], None
