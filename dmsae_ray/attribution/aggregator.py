"""The actor that aggregates attribution across shards: a core is selected by what it comes to.

Not the statistic `attribution.aggregator`, which is in scores.py. Many chains share one; Ray restarts it where it dies,
and it goes on from the ledgers' files.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import partial as bound
from pathlib import Path
from typing import Any

import ray
import torch

from dmsae_ray.attribution.ledger import Ledger
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.attribution.scores import ScoreSettings, enough, scores, split_half
from dmsae_ray.files import Elsewhere, be_patient


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


@dataclass(frozen=True)
class Account:
    """One trained SAE's attribution, as every call to the actor names it."""

    folder: str
    """of the partial sums"""
    shards: int
    """how many there are"""
    stamp: str
    """identifies the SAE"""
    settings: ScoreSettings
    place: Elsewhere | None = None
    """what the output folder stands for, which the actor's process has to know"""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Aggregator:
    """Every call names its account in full: a restarted actor needs no memory of its own."""

    OPEN = 64
    """ledgers kept in memory; one that was dropped is opened again from its files"""

    def __init__(self, patience_s: float = 60.0):
        self.patience_s = patience_s
        self._ledgers: OrderedDict[Account, Ledger] = OrderedDict()

    def _open(self, account: Account) -> Ledger:
        if account not in self._ledgers:
            stop = None if account.settings.until_jaccard is None else bound(enough, settings=account.settings)
            be_patient(Path(account.folder))
            self._ledgers[account] = Ledger(Path(account.folder), account.shards, account.stamp, self.patience_s, stop)
            while len(self._ledgers) > self.OPEN:
                self._ledgers.popitem(last=False)
        self._ledgers.move_to_end(account)
        return self._ledgers[account]

    def begin(self, account: Account) -> None:
        """A worker group starts (or starts again): what was dealt to an earlier one is dealt anew."""
        self._open(account).redeal()

    def take(self, account: Account, worker: int) -> int:
        return self._open(account).take(worker)

    def give(self, account: Account, worker: int, shard: int, partial: Partial) -> None:
        self._open(account).give(worker, shard, partial)

    def finished(self, account: Account) -> set[int]:
        """Shards that are back."""
        return self._open(account).done

    def total(self, account: Account) -> Attribution:
        """Of the shards that are back."""
        book = self._open(account)
        partials = book.partials()
        halves = split_half(partials, account.settings)
        return Attribution(
            scores_P=scores(partials, account.settings),
            tokens=sum(partial.tokens for partial in partials),
            shards=len(partials),
            workers=len(book.workers()),
            resent=book.resent,
            split_half_spearman=halves.spearman,
            split_half_jaccard=halves.jaccard,
        )
