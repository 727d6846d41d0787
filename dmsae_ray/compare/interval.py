"""Uncertainty: what another draw of seeds would have given.

How often these intervals hold the truth: `jobs/bench/interval_coverage.py`.
Shape letters: P values, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit

SEEDS_FOR_INTERVAL = 4
"""Below four seeds their spread says nothing; the values themselves are then given."""
COVERAGE = 0.95
NO_SPREAD = 1e-12
"""Values that differ by less, relative to their size, are equal: they say nothing of how far another seed would be."""
COSINE = (-1.0, 1.0)
"""Range of a mean of cosines or correlations."""
SHARE = (0.0, 1.0)
"""Range of a share."""


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
    """95 % interval of the mean over seeds (`over_seeds`); None below four seeds, and where all values are equal"""
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


def spread(
    values: Sequence[float | None],
    left: Sequence[int],
    right: Sequence[int],
    within: tuple[float, float] | None = None,
) -> Spread | None:
    """Spread of those that are known, None if none is. left, right: the seeds each number comes from, the same twice if
    it is one. within: the range that such a number has, if it has one.
    """
    known = [place for place, value in enumerate(values) if value is not None]
    if not known:
        return None
    values_P = np.array([values[place] for place in known])
    interval = over_seeds(values_P, [left[place] for place in known], [right[place] for place in known], within)
    return Spread(
        float(values_P.mean()),
        float(values_P.min()),
        float(values_P.max()),
        len(known),
        interval,
        None if interval else tuple(values_P.tolist()),
    )


def over_seeds(
    values_P: np.ndarray, left: Sequence[int], right: Sequence[int], within: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """95 % interval of the mean, for other seeds: Student's t with the variance of `mean_variance`. None where there is
    none.

    within: a range that the mean cannot leave; the ends are cut to it, which loses no truth.
    """
    found = mean_variance(values_P, left, right)
    if found is None:
        return None
    low, high = around(float(values_P.mean()), *found)
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


def mean_variance(values_P: np.ndarray, left: Sequence[int], right: Sequence[int]) -> tuple[float, int] | None:
    """Variance of the mean of numbers that each belong to one seed or to a pair of them, and its degrees of freedom.
    None below SEEDS_FOR_INTERVAL, where leaving a seed out leaves no number, and where all numbers are equal.

    Numbers that have a seed in common are not independent, so that seeds are left out one at a time, each with all its
    numbers (Arvesen's jackknife of a U-statistic, Ann. Math. Stat. 40, 1969). Where seeds differ, this is exact; where
    only pairs do, it is too large (Efron and Stein, Ann. Stat. 9, 1981), three times at four seeds. A few coarse
    numbers may by accident have equal means whichever seed is left out: the variance of independent numbers is the
    least.
    """
    seeds = sorted({*left, *right})
    if len(seeds) < SEEDS_FOR_INTERVAL or equal(values_P):
        return None
    has_SP = np.array([(np.array(left) == seed) | (np.array(right) == seed) for seed in seeds])
    counts_S = (~has_SP).sum(axis=1)
    if not counts_S.all():
        return None
    means_S = ~has_SP @ values_P / counts_S
    jackknife = (len(seeds) - 1) / len(seeds) * float(((means_S - means_S.mean()) ** 2).sum())
    # Two numbers of four seeds are two numbers: no more degrees of freedom than those.
    return max(jackknife, float(values_P.var(ddof=1)) / len(values_P)), min(len(seeds), len(values_P)) - 1


def around(mean: float, variance: float, freedom: int) -> tuple[float, float]:
    """95 % interval of Student's t."""
    half = float(stdtrit(freedom, (1 + COVERAGE) / 2)) * math.sqrt(variance)
    return mean - half, mean + half


def equal(values_P: np.ndarray) -> bool:
    """Whether the numbers are one and the same."""
    return bool(np.ptp(values_P) <= NO_SPREAD * np.abs(values_P).max())


def of_share(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper and Pearson, Biometrika 26, 1934): it holds the truth at least so often,
    whatever the share and however few the trials. of: at least 1.
    """
    tail = (1 - COVERAGE) / 2
    low = float(betaincinv(hits, of - hits + 1, tail)) if hits else 0.0
    return low, float(betaincinv(hits + 1, of - hits, 1 - tail)) if hits < of else 1.0
