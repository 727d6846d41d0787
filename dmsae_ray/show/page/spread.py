"""One number per group of chains, with what is known about its uncertainty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmsae_ray.compare import interval
from dmsae_ray.show.page.table import Column

ONE_SEED = "one seed says nothing about the others"
"""Why a spread has no ends."""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds. Several chains of one seed count as one: they are not independent."""

    mean: float
    """mean over seeds of the seed's mean"""
    low: float
    """lower end: of the interval, or smallest seed"""
    high: float
    """upper end"""
    kind: str
    """`95 % interval` of the mean over seeds; `range` below four seeds, and where all are equal; `one seed`"""
    seeds: int
    """how many seeds"""
    chains: int
    """how many values"""

    @property
    def ends(self) -> tuple[float, float] | tuple[None, None]:
        """Lower and upper end; a single seed has none."""
        return (None, None) if self.seeds == 1 else (self.low, self.high)

    def words(self) -> str:
        """What `low` and `high` are."""
        return self.kind if self.seeds == 1 else f"{self.kind} over {self.seeds} seeds"


def over_seeds(values: Iterable[tuple[int, float | None]], within: tuple[float, float] | None = None) -> Spread | None:
    """values: (seed, number) of each chain; those without a number are left out. None if none has one. within: the
    range that such a number has.
    """
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None and np.isfinite(value):
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return None
    means_S = np.array([np.mean(by_seed[seed]) for seed in sorted(by_seed)])
    mean, seeds, chains = float(means_S.mean()), len(means_S), sum(map(len, by_seed.values()))
    ends = interval.over_seeds(means_S, range(seeds), range(seeds), within)
    if ends is None:
        kind = "one seed" if seeds == 1 else "range"
        return Spread(mean, float(means_S.min()), float(means_S.max()), kind, seeds, chains)
    return Spread(mean, *ends, f"{interval.COVERAGE:.0%} interval".replace("%", " %"), seeds, chains)


def ends(spread: dict[str, Any], scored: int) -> dict[str, Any]:
    """A spread of comparison.json as a row's `mean`, `low`, `high`, and in `what` what these are; scored: pairs that it
    is over.
    """
    if scored == 1:
        return {"mean": spread["mean"], "low": None, "high": None, "what": "one pair"}
    low, high = spread["interval"] or (spread["min"], spread["max"])
    return {
        "mean": spread["mean"],
        "low": low,
        "high": high,
        "what": "95 % interval" if spread["interval"] else "range of pairs",
    }


def ends_columns() -> list[Column]:
    """The columns of what `ends` gives."""
    return [
        Column("Mean", lambda row: row["mean"], "share"),
        Column("Low", lambda row: row["low"], "share", why=lambda row: "a single pair has no range"),
        Column("High", lambda row: row["high"], "share", why=lambda row: "a single pair has no range"),
        Column("Low and high are", lambda row: row["what"]),
    ]
