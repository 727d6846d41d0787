"""Chains that go on with fewer workers where nodes are lost, and have all of them again once there is room: with a
controller of Ray Train's that chooses between the numbers of workers that share a chain's lanes evenly.

A group grows just after its chains wrote a checkpoint, so that next to nothing is trained twice. Results are those of
whatever number: the rows are the same, and what workers share decides whether last bits are (train.parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from dmsae_ray.cluster.capacity import spare_cpus, worker_group
from dmsae_ray.cluster.nodes import groups_fitting
from dmsae_ray.cluster.present import nodes_now, usable
from dmsae_ray.config import Config


def numbers(config: Config) -> list[int]:
    """Of workers that a group may have, the largest first."""
    cluster = config.cluster
    return [n for n in range(cluster.workers, cluster.fewest_workers - 1, -1) if config.train.lanes % n == 0]


def most_workers(config: Config, runs: str) -> int | None:
    """As many of them as the connected cluster has room for at the moment; None: not even the fewest. runs: what the
    names of one's own runs begin with, whose workers would make room.
    """
    nodes, group = nodes_now(runs), worker_group(config)
    left = [node.beside_others() for node in nodes if usable(config, node)]
    spare = spare_cpus(config, nodes)
    return next((n for n in numbers(config) if groups_fitting(left, replace(group, workers=n), spare)), None)


class Elastic(FixedScalingPolicy):
    """Begins, and begins again, with as many workers as there is room for; grows after a checkpoint."""

    def __init__(
        self, scaling: Any, allowed: Sequence[int], most: Callable[[], int | None], saved: Callable[[], object]
    ):
        """scaling: Ray Train's configuration; allowed: numbers of workers, the largest first; most: of them, those that
        there is room for; saved: something else after each checkpoint, None where it is no time to begin again.
        """
        super().__init__(scaling)
        self.allowed, self.most, self.saved = allowed, most, saved
        self._saved: object = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        return self._with(self.most() or self.allowed[-1])

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        if worker_group_state.num_workers == self.allowed[0] or (saved := self.saved()) in (None, self._saved):
            return NoopDecision()
        self._saved = saved
        more = self.most() or 0
        return self._with(more) if more > worker_group_state.num_workers else NoopDecision()

    def _with(self, workers: int) -> ResizeDecision:
        return ResizeDecision(workers, self.scaling_config._resources_per_worker_not_none)
