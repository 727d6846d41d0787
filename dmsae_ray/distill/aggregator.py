"""The actor that aggregates attribution across shards and selects the core.

One per chain, owned by its driver; Ray restarts it where it dies, and it goes on from the ledger's files.
"""

from __future__ import annotations

from pathlib import Path

import ray
import torch

from dmsae_ray.distill.attribution import AttributionSettings, total
from dmsae_ray.distill.ledger import Ledger
from dmsae_ray.distill.select import select


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Aggregator:
    """Every call names the folder, shard count and stamp of its ledger: a restarted actor needs no memory of its own."""

    def __init__(self, settings: AttributionSettings, patience_s: float = 60.0):
        self.settings, self.patience_s = settings, patience_s
        self._ledger: Ledger | None = None

    def _open(self, ledger: tuple[str, int, str]) -> Ledger:
        folder, shards, stamp = ledger
        if self._ledger is None or (self._ledger.folder, self._ledger.stamp) != (Path(folder), stamp):
            self._ledger = Ledger(Path(folder), shards, stamp, self.patience_s)
        return self._ledger

    def begin(self, ledger: tuple[str, int, str]) -> None:
        """A worker group starts (or starts again): what was dealt to an earlier one is dealt anew."""
        self._open(ledger).redeal()

    def take(self, ledger: tuple[str, int, str], worker: int) -> int:
        return self._open(ledger).take(worker)

    def give(self, ledger: tuple[str, int, str], worker: int, shard: int, sums_P: torch.Tensor, tokens: int) -> None:
        self._open(ledger).give(worker, shard, sums_P, tokens)

    def finished(self, ledger: tuple[str, int, str]) -> set[int]:
        """Shards that are back."""
        return self._open(ledger).done

    def select(self, ledger: tuple[str, int, str]) -> dict:
        """The core: latent ids chosen, scores of all candidates [P] fp64, and how the work went."""
        book = self._open(ledger)
        partials = book.partials()
        scores_P = total(partials, self.settings)
        return {
            "ids": select(scores_P, self.settings.tau),
            "scores": scores_P,
            "tokens": sum(tokens for _, tokens in partials),
            "shards": book.shards,
            "workers": len(book.workers()),
            "resent": book.resent,
        }
