"""Uncertainty: what another draw of seeds would have given.

Shape letters: P values, R resamples, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmsae_ray.draws import INTERVAL

SEEDS_FOR_INTERVAL = 4
"""Below four seeds resampling them says nothing; the values themselves are then given."""
RESAMPLES = 2000
COVERAGE = 0.95
Z = 1.959963984540054
"""Normal quantile of that coverage, both sides."""


@dataclass(frozen=True)
class Spread:
    """One number over the members of a group."""

    mean: float
    """mean"""
    min: float
    """smallest"""
    max: float
    """largest"""
    n: int
    """how many have this number"""
    interval: tuple[float, float] | None
    """95 % interval of the mean by resampling seeds; None below four seeds"""
    values: tuple[float, ...] | None
    """the numbers themselves, where there is no interval"""

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "mean": self.mean,
            "min": self.min,
            "max": self.max,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "values": None if self.values is None else list(self.values),
        }


def spread(values: Sequence[float | None], left: Sequence[int], right: Sequence[int], seed: int) -> Spread | None:
    """Spread of those that are known, None if none is. left, right: the seeds each number comes from, the same twice if
    it is one.

    seed: of the resampling.
    """
    known = [place for place, value in enumerate(values) if value is not None]
    if not known:
        return None
    values_P = np.array([values[place] for place in known])
    interval = over_seeds(values_P, [left[place] for place in known], [right[place] for place in known], seed)
    return Spread(
        float(values_P.mean()),
        float(values_P.min()),
        float(values_P.max()),
        len(known),
        interval,
        None if interval else tuple(values_P.tolist()),
    )


def over_seeds(
    values_P: np.ndarray, left: Sequence[int], right: Sequence[int], seed: int
) -> tuple[float, float] | None:
    """Percentile interval of the mean over resampled seeds; None below SEEDS_FOR_INTERVAL.

    Pairs that have a chain in common are not independent, so seeds are drawn, not pairs: a pair of two seeds counts as
    often as the product of how often both were drawn, what is of one seed as often as that seed was.
    """
    seeds = sorted({*left, *right})
    if len(seeds) < SEEDS_FOR_INTERVAL:
        return None
    rng = np.random.default_rng([seed, INTERVAL])
    times_RS = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES)
    left_P = np.array([seeds.index(one) for one in left])
    right_P = np.array([seeds.index(one) for one in right])
    weight_RP = times_RS[:, left_P] * np.where(left_P == right_P, 1, times_RS[:, right_P])
    weight_RP = weight_RP[weight_RP.sum(axis=1) > 0]  # one seed drawn throughout has no pair of seeds
    means_R = weight_RP @ values_P / weight_RP.sum(axis=1)
    low, high = np.quantile(means_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): within 0 to 1 and sensible for a handful of trials. of: at least 1."""
    share, z2 = hits / of, Z * Z
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, centre - half), min(1.0, centre + half)
