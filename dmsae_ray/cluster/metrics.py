"""What Ray exports of a sweep beside its own metrics, at each node's Prometheus endpoint: `ray_<name>`, set where
progress is told and at log steps, never in each step. The panels: jobs/grafana_dashboard.json.

A series is a chain's (or a rank's of it, or a phase's of a sweep), so their number is bounded by the grid; Ray adds the
node and the process. One that is not set any more because its process ended is gone after seconds.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from dmsae_ray.held_up import REQUESTS

GAUGES = {
    "dmsae_chains": ("chains of a sweep that are in this phase", ("sweep", "phase")),
    "dmsae_chain_fraction": ("share of a chain that is done", ("sweep", "chain")),
    "dmsae_tokens_per_second": (
        "tokens a chain trains on, evaluates or attributes per second",
        ("sweep", "chain", "phase"),
    ),
    "dmsae_step_seconds": ("mean time of the training steps since the last log step", ("sweep", "chain", "rank")),
    "dmsae_data_wait_seconds": ("of it, waiting for the batch", ("sweep", "chain", "rank")),
    "dmsae_retries": ("times that a chain's worker group was lost or failed, and began again", ("sweep", "chain")),
    "dmsae_resumes": ("times that the cycle under way went on from a checkpoint", ("sweep", "chain")),
    "dmsae_requests_waiting": ("reads and writes that wait for an object store's server to answer", ("sweep",)),
}
"""Description and tags."""


@functools.cache
def gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, tags = GAUGES[name]
    return Gauge(name, description, tags)


def tell_of_held_up_requests(sweep: str) -> None:
    """From now on those of this process."""
    REQUESTS.tell(lambda count: gauge("dmsae_requests_waiting").set(count, {"sweep": sweep}))


def tell_phases(sweep: str, phases: Iterable[str], now: Iterable[str]) -> None:
    """phases: all that there are. now: that of each chain."""
    counts = Counter(now)
    for phase in phases:
        gauge("dmsae_chains").set(counts[phase], {"sweep": sweep, "phase": phase})


def tell_retries(sweep: str, chains: Iterable[str], retries: int) -> None:
    for chain in chains:
        gauge("dmsae_retries").set(retries, {"sweep": sweep, "chain": chain})


class ChainMetrics:
    """What one chain's rank 0 tells."""

    def __init__(self, sweep: str, chain: str):
        self._tags = {"sweep": sweep, "chain": chain}
        self._phase: str | None = None

    def at(self, phase: str, fraction: float, tokens_per_s: float | None) -> None:
        gauge("dmsae_chain_fraction").set(fraction, self._tags)
        if self._phase not in (None, phase):
            gauge("dmsae_tokens_per_second").set(0.0, self._tags | {"phase": self._phase})
        self._phase = None
        if tokens_per_s is not None:
            gauge("dmsae_tokens_per_second").set(tokens_per_s, self._tags | {"phase": phase})
            self._phase = phase

    def resumes(self, times: int) -> None:
        gauge("dmsae_resumes").set(times, self._tags)


class StepMetrics:
    """What each rank tells of a cycle's training."""

    def __init__(self, sweep: str, chain: str, rank: int):
        self._tags = {"sweep": sweep, "chain": chain, "rank": str(rank)}
        self._last = (0, 0.0, 0.0)

    def begin(self, step: int, at: float) -> None:
        """Before the first step. at: monotonic seconds."""
        self._last = (step, at, 0.0)

    def log(self, done: int, at: float, waited: float) -> None:
        """done: steps of the cycle. waited: seconds since `begin`."""
        before, since, waited_before = self._last
        self._last = (done, at, waited)
        gauge("dmsae_step_seconds").set((at - since) / (done - before), self._tags)
        gauge("dmsae_data_wait_seconds").set((waited - waited_before) / (done - before), self._tags)

    def end(self) -> None:
        for name in ("dmsae_step_seconds", "dmsae_data_wait_seconds"):
            gauge(name).set(0.0, self._tags)
