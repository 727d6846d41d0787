"""The actor that aggregates attribution across shards: a core is selected by what it comes to.

Not the statistic `attribution.aggregator`, which is in scores.py. One for each trial, whose chains share it; Ray
restarts it where it dies, and it goes on from the ledger's files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial as bound
from pathlib import Path
from typing import Any

import ray
import torch

from dmsae_ray.attribution.ledger import Ledger
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.attribution.scores import ScoreSettings, enough, scores, split_half


@dataclass(frozen=True, eq=False)
class Attribution:
    """Every candidate's attribution, how sure it is, and how the work went."""

    scores_P: torch.Tensor
    """fp64 [P] by latent id"""
    tokens: int
    shards: int
    workers: int
    resent: int
    """shards that came back more than once"""
    split_half_spearman: float | None
    split_half_jaccard: float | None
    """of two halves of the shards: rank correlation of the scores, overlap of the cores they would give"""

    def facts(self) -> dict[str, Any]:
        """All but the scores, as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "scores_P"}


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

    def total(self, ledger: tuple[str, int, str]) -> Attribution:
        """Of the shards that are back."""
        book = self._open(ledger)
        partials = book.partials()
        halves = split_half(partials, self.settings)
        return Attribution(
            scores_P=scores(partials, self.settings),
            tokens=sum(partial.tokens for partial in partials),
            shards=len(partials),
            workers=len(book.workers()),
            resent=book.resent,
            split_half_spearman=halves.spearman,
            split_half_jaccard=halves.jaccard,
        )
