"""From the shards' partial sums to the candidates' scores, and how sure they are (method: "Attribute").

Letters: P candidates, N values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmsae_ray.attribution.histogram import Histogram
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.core.select import jaccard, select


@dataclass(frozen=True)
class ScoreSettings:
    """What decides scores and core, given the partial sums."""

    aggregator: str = "mean_abs"
    """`mean_abs`: mean |a| over tokens; `mean_signed`: |mean a|; `quantile`: of |a| over the tokens with the latent
    active, times its density
    """
    quantile: float = 0.9
    """which one, with aggregator quantile"""
    tau: float = 0.9
    """share of the total score that the core carries"""
    until_jaccard: float | None = None
    """agreement of the two halves' cores at which no further shard is scored; None: all are"""


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of the shards of even and of odd number: what another draw of half as many tokens would leave of the
    result.
    """

    spearman: float | None
    """rank correlation of the two halves' scores, over candidates with a score in one of them; None where that says
    nothing
    """
    jaccard: float | None
    """of the two sets that the halves select; None where a half has no score at all"""


def scores(partials: Sequence[Partial], settings: ScoreSettings) -> torch.Tensor:
    """Scores [P], fp64, per token. partials: in shard order, in which they are added: the same bits whoever made
    them.
    """
    tokens = max(sum(partial.tokens for partial in partials), 1)  # none, where all positions were outliers
    candidates = partials[0].signed_P.shape[0]
    if settings.aggregator == "quantile":
        histogram = Histogram.merged([partial.histogram for partial in partials])
        return histogram.quantile(settings.quantile, candidates) * histogram.active(candidates) / tokens
    assert settings.aggregator in ("mean_abs", "mean_signed"), settings.aggregator
    sums_P = torch.zeros(candidates, dtype=torch.float64)
    for partial in partials:
        sums_P += partial.signed_P if settings.aggregator == "mean_signed" else partial.absolute_P
    return sums_P.abs() / tokens


def split_half(partials: Sequence[Partial], settings: ScoreSettings) -> SplitHalf:
    """How far the halves agree. partials: in shard order; fewer than two leave a half empty, and nothing to say."""
    if len(partials) < 2:
        return SplitHalf(None, None)
    even_P, odd_P = scores(partials[0::2], settings), scores(partials[1::2], settings)
    if not (bool(even_P.any()) and bool(odd_P.any())):
        return SplitHalf(None, None)
    scored_P = (even_P > 0) | (odd_P > 0)  # the silent ones would agree on their shared last rank
    correlation = spearman(even_P[scored_P], odd_P[scored_P])
    even, odd = (set(select(half_P, settings.tau).tolist()) for half_P in (even_P, odd_P))
    return SplitHalf(correlation, jaccard(len(even & odd), len(even), len(odd)))


def enough(partials: Sequence[Partial], settings: ScoreSettings) -> bool:
    """Whether the halves agree as well as `until_jaccard`, which must be given, asks for."""
    assert settings.until_jaccard is not None, "nobody asks where all shards count anyway"
    agreement = split_half(partials, settings).jaccard
    return agreement is not None and agreement >= settings.until_jaccard


def spearman(a_N: torch.Tensor, b_N: torch.Tensor) -> float | None:
    """Rank correlation, ties at their mean rank; None where all values of a side are equal.

    As scipy.stats.spearmanr, whose import would cost every worker more than a second.
    """
    deviations = []
    for values_N in (a_N, b_N):
        _, place_N, count = torch.unique(values_N, return_inverse=True, return_counts=True)
        rank_N = (count.cumsum(0) - (count - 1) / 2)[place_N].double()
        deviations.append(rank_N - rank_N.mean())
    x_N, y_N = deviations
    norm = float((x_N.square().sum() * y_N.square().sum()).sqrt())
    return float((x_N * y_N).sum()) / norm if norm else None
