"""One chain on one rank: which cycle it is at, what it says of itself, and how it ends.

What a chain needs to go on after a crash is in its folder (see folder.py).
"""

from __future__ import annotations

import time

from dmsae_ray.activations.shard import ShardError
from dmsae_ray.causes import disk_full
from dmsae_ray.cluster.metrics import ChainMetrics
from dmsae_ray.distill.failure import DiskFull, write_failure
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.rank import Rank
from dmsae_ray.sae.step_report import Diverged
from dmsae_ray.store import StoreError


class Chain:
    """Where one chain is. Its cycles do the work, one after the other."""

    def __init__(self, plan: ChainPlan, rank: Rank):
        self.plan, self.rank = plan, rank
        self.cycle = len(plan.folder.records())
        """the one under way, or to begin next"""
        self.at_step: int | None = None
        """the training step under way; None outside of training"""
        self.rates: dict[str, float] = {}
        """tokens/s of the phases beside training, as last measured: shown until a phase has a new one"""
        self.metrics = ChainMetrics(plan.config.name, plan.label)
        self._began: tuple[float, float] | None = None
        """when it first did something, and the done share of the chain then"""
        self.say(phase="starting")

    def tidy(self) -> None:
        """Before the first cycle: drop what killed writers left."""
        if self.rank.writes:
            self.rank.lease.check()
            self.plan.folder.tidy()

    def say(self, phase: str, within: float = 0.0, fraction: float | None = None, **values) -> None:
        """Tell the board where this chain is. within: done share of this cycle. Never waits for an answer."""
        if not self.rank.writes:
            return
        if fraction is None:
            fraction = (self.cycle + within) / self.plan.cycles
        eta = None
        if phase != "starting":
            now = time.monotonic()
            if self._began is None:
                self._began = now, fraction
            started, fraction_then = self._began
            gained = fraction - fraction_then
            eta = (now - started) / gained * (1 - fraction) if gained > 0 else None
        values = {"step": None, "steps": None, "tokens_per_s": None} | values
        self.metrics.at(phase, fraction, values["tokens_per_s"])
        self.rank.board.update.remote(
            self.plan.label,
            phase=phase,
            cycle=self.cycle,
            cycles=self.plan.cycles,
            fraction=fraction,
            eta_s=eta,
            **values,
        )

    def say_saved(self, step: int) -> None:
        """Tell the board that a checkpoint was written before this step: who begins anew now loses least."""
        if self.rank.writes:
            self.rank.board.update.remote(self.plan.label, saved=[self.cycle, step])

    def fail(self, error: Exception) -> None:
        """Mark the chain failed. Divergence is final for this chain's fields; anything else is tried again by the next
        sweep.
        """
        if not self.rank.writes and isinstance(error, Diverged):
            return  # all ranks diverge together, rank 0 writes
        if isinstance(error, Diverged):
            kind = "diverged"
        else:
            kind = "data" if isinstance(error, ShardError | StoreError) else "error"
        if isinstance(error, DiskFull):
            # Not every error of a full disk names the file; it was one of this chain's.
            reason = str(error) if str(error).startswith("/") else f"{self.plan.folder.path}: {error}"
        else:
            reason = str(error) if kind != "error" else f"{type(error).__name__}: {error}"
        try:
            write_failure(self.plan, self.rank.lease, kind, reason, self.cycle, self.at_step)
        except OSError as unwritten:
            # Where there is no room for that either, the driver finds the chain not finished, and says it.
            if not isinstance(error, DiskFull) or disk_full(unwritten) is None:
                raise
        self.rank.board.update.remote(self.plan.label, phase="failed", message=reason)
