"""The actor that aggregates attribution across shards and selects the core.

One per chain, owned by its driver; Ray restarts it where it dies, and it goes on from the ledger's files.
"""

from __future__ import annotations

from functools import partial as bound
from pathlib import Path

import ray

from dmsae_ray.attribution.ledger import Ledger
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.attribution.scores import ScoreSettings, enough, scores, split_half
from dmsae_ray.core.select import select


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Aggregator:
    """Every call names the folder, shard count and stamp of its ledger: a restarted actor needs no memory of
    its own.
    """

    def __init__(self, settings: ScoreSettings, patience_s: float = 60.0):
        self.settings, self.patience_s = settings, patience_s
        self._ledger: Ledger | None = None

    def _open(self, ledger: tuple[str, int, str]) -> Ledger:
        folder, shards, stamp = ledger
        if self._ledger is None or (self._ledger.folder, self._ledger.stamp) != (Path(folder), stamp):
            stop = None if self.settings.until_jaccard is None else bound(enough, settings=self.settings)
            self._ledger = Ledger(Path(folder), shards, stamp, self.patience_s, stop)
        return self._ledger

    def begin(self, ledger: tuple[str, int, str]) -> None:
        """A worker group starts (or starts again): what was dealt to an earlier one is dealt anew."""
        self._open(ledger).redeal()

    def take(self, ledger: tuple[str, int, str], worker: int) -> int:
        return self._open(ledger).take(worker)

    def give(self, ledger: tuple[str, int, str], worker: int, shard: int, partial: Partial) -> None:
        self._open(ledger).give(worker, shard, partial)

    def finished(self, ledger: tuple[str, int, str]) -> set[int]:
        """Shards that are back."""
        return self._open(ledger).done

    def select(self, ledger: tuple[str, int, str]) -> dict:
        """The core: latent ids chosen, scores of all candidates [P] fp64, how sure they are, and how the work went."""
        book = self._open(ledger)
        partials = book.partials()
        scores_P, halves = scores(partials, self.settings), split_half(partials, self.settings)
        return {
            "ids": select(scores_P, self.settings.tau),
            "scores": scores_P,
            "tokens": sum(partial.tokens for partial in partials),
            "shards": len(partials),
            "workers": len(book.workers()),
            "resent": book.resent,
            "split_half_spearman": halves.spearman,
            "split_half_jaccard": halves.jaccard,
        }
