"""The cluster of one command: sought before hours of work, joined or started when it is needed, left in the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from dmsae_ray.cluster.address import cluster_address
from dmsae_ray.cluster.capacity import Capacity, concurrent_now
from dmsae_ray.cluster.connection import check_fits_here, connect, disconnect
from dmsae_ray.cluster.probe import check_nodes
from dmsae_ray.config import Config


class HeldCluster:
    """To be used as a context: its end leaves the cluster, if it was ever joined."""

    def __init__(
        self,
        config: Config,
        chains: Callable[[], int],
        verbose: bool,
        say: Callable[[str], None],
        logs: Path,
        when_there: Callable[[Capacity], None] = lambda capacity: None,
    ):
        """chains: how many are to be trained; 0: only the language model will be run. logs: where those of a cluster of
        our own are kept. when_there: called once, with what it holds.
        """
        self.config, self.chains, self.verbose, self.say, self.logs = config, chains, verbose, say, logs
        self.when_there = when_there
        self._capacity: Capacity | None = None

    def reach(self) -> None:
        """Join the cluster that is to be joined, or see that what would be started on this machine will do.

        Raises ValueError if there is none, if it is too small, or if a node does not see the output folder.
        """
        if cluster_address(self.config) is not None:
            self.connect()
        check_fits_here(self.config, self.chains())

    def connect(self) -> Capacity:
        """The cluster's capacity; it is joined or started with the first call. Raises ValueError as `reach` does."""
        if self._capacity is None:
            self._capacity = connect(self.config, self.chains(), self.verbose, self.say)
            if not self._capacity.local:
                check_nodes(self.config)
            self.when_there(self._capacity)
        return self._capacity

    def at_once(self) -> Callable[[], int]:
        """How many chains there may be at once, or groups of them in lockstep, whenever it is asked."""
        there = self.connect()
        if there.local:
            return lambda: there.concurrent
        return functools.partial(concurrent_now, self.config, self.chains())

    def __enter__(self) -> HeldCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._capacity is not None:
            disconnect(self._capacity, self.logs)
