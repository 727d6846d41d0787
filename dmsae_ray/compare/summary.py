"""A sweep's agreement in a few numbers: by what differs between two chains, and as a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmsae_ray.compare.pair import PairResult

SEEDS_FOR_INTERVAL = 4
"""Below four seeds resampling them says nothing; the values themselves are then given."""
RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Spread:
    """One score over the pairs of a group."""

    mean: float
    """mean over pairs"""
    min: float
    """smallest"""
    max: float
    """largest"""
    interval: tuple[float, float] | None
    """95 % interval of the mean by resampling seeds; None below four seeds"""


@dataclass(frozen=True)
class GroupSummary:
    """Pairs that differ in the same thing."""

    pairs: int
    """pairs in the group"""
    scored: int
    """pairs whose cores could be compared"""
    seeds: int
    """different seeds among the scored pairs"""
    pw_mcc: Spread | None
    """None if no pair was scored"""
    overlap: Spread | None
    """None if no pair was scored"""


@dataclass(frozen=True)
class Summary:
    """A sweep's agreement."""

    available: bool
    """whether any pair was scored"""
    reason: str | None
    """why not"""
    groups: dict[str, GroupSummary]
    """by what differs: `seed`, `k`, `both`; only those that occur"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, intervals as lists."""
        plain = dataclasses.asdict(self)
        for group in plain["groups"].values():
            for name in ("pw_mcc", "overlap"):
                if group[name] is not None and group[name]["interval"] is not None:
                    group[name]["interval"] = list(group[name]["interval"])
        return plain


def summarise(pairs: Sequence[PairResult], seed: int = 0) -> Summary:
    """Agreement by what differs. seed: of the resampling. One chain alone has no agreement: not available, never 1."""
    groups = {}
    for name in ("seed", "k", "both"):
        members = [pair for pair in pairs if pair.differs == name]
        if members:
            groups[name] = _group(members, seed)
    reason = None
    if not pairs:
        reason = "fewer than two chains finished: agreement needs two"
    elif not any(group.scored for group in groups.values()):
        reason = "no pair could be scored: " + "; ".join(sorted({pair.reason for pair in pairs if pair.reason}))
    return Summary(available=reason is None, reason=reason, groups=groups)


def _group(members: list[PairResult], seed: int) -> GroupSummary:
    scored = [pair for pair in members if pair.pw_mcc is not None]
    seeds = {pair.seed_a for pair in scored} | {pair.seed_b for pair in scored}
    return GroupSummary(
        pairs=len(members), scored=len(scored), seeds=len(seeds),
        pw_mcc=_spread(scored, "pw_mcc", seed), overlap=_spread(scored, "overlap", seed),
    )  # fmt: skip


def _spread(scored: list[PairResult], field: str, seed: int) -> Spread | None:
    if not scored:
        return None
    values = np.array([getattr(pair, field) for pair in scored])
    return Spread(float(values.mean()), float(values.min()), float(values.max()), _interval(scored, values, seed))


def _interval(scored: list[PairResult], values_P: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Percentile interval of the mean over resampled seeds.

    Pairs that have a chain in common are not independent, so seeds are drawn, not pairs: a pair of two seeds counts as often
    as the product of how often both were drawn, a pair within one seed as often as that seed was.
    """
    seeds = sorted({pair.seed_a for pair in scored} | {pair.seed_b for pair in scored})
    if len(seeds) < SEEDS_FOR_INTERVAL:
        return None
    rng = np.random.default_rng([seed, 3])
    times_RS = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES)
    left_P = np.array([seeds.index(pair.seed_a) for pair in scored])
    right_P = np.array([seeds.index(pair.seed_b) for pair in scored])
    weight_RP = times_RS[:, left_P] * np.where(left_P == right_P, 1, times_RS[:, right_P])
    weight_RP = weight_RP[weight_RP.sum(axis=1) > 0]  # one seed drawn throughout has no pair of seeds
    means_R = weight_RP @ values_P / weight_RP.sum(axis=1)
    low, high = np.quantile(means_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def consistency_matrix(labels: Sequence[str], pairs: Sequence[PairResult], field: str = "pw_mcc") -> list[list[float | None]]:
    """Symmetric matrix of one score, in the order of `labels`.

    The diagonal is None (a chain's agreement with itself is no measurement), and so is a pair without a score.
    """
    place = {label: i for i, label in enumerate(labels)}
    matrix: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    for pair in pairs:
        i, j = place[pair.a], place[pair.b]
        matrix[i][j] = matrix[j][i] = getattr(pair, field)
    return matrix
