"""Selection: from the candidates' attribution, or another value of theirs, to the next core.

Candidates are latents 0..N-1 of an SAE (its core and first free group), so a candidate's index is its latent id.
Shape letters: N candidates, F width, C core size, D model dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

ROUNDING = 1e-12
"""Relative slack in `share >= tau`: nine of ten equal scores are a share of 0.9 whatever their last bit says."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates by score descending, ties by id ascending."""

    ids_N: torch.Tensor
    """latent ids, int64 [N]"""
    scores_N: torch.Tensor
    """their scores, fp64 [N]"""
    share_N: torch.Tensor
    """share of the total, fp64 [N], carried by the first 1, 2, ... of them; the last entry is 1"""


def rank(scores_N: torch.Tensor) -> Ranking:
    """Sort candidates by score. scores_N: fp64 [N] by latent id.

    Raises ValueError if a score is negative or not finite, or if all are zero.
    """
    values_N = torch.as_tensor(scores_N).detach().cpu().double().numpy()
    if values_N.ndim != 1 or values_N.size == 0:
        raise ValueError(f"scores have shape {values_N.shape}, need one score for each of at least one candidate")
    if not np.isfinite(values_N).all() or values_N.min() < 0:
        raise ValueError("scores must be finite and not negative; the attribution of this cycle is broken")
    order_N = _falling(values_N)
    sorted_N = values_N[order_N]
    running_N = np.cumsum(sorted_N)
    if running_N[-1] == 0:
        raise ValueError(
            f"all {values_N.size} candidates have attribution 0, so there is no share to select by: none of them was "
            "active on the attribution tokens, or none moved the loss; train longer, or raise k"
        )
    return Ranking(torch.from_numpy(order_N), torch.from_numpy(sorted_N), torch.from_numpy(running_N / running_N[-1]))


def select(scores_N: torch.Tensor, tau: float) -> torch.Tensor:
    """Ids, int64 ascending, of the smallest set of candidates whose share of the total score reaches `tau`.

    scores_N: fp64 [N] by latent id. Raises ValueError as `rank` does, or if tau is outside (0, 1].
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}, needs a share above 0, at most 1")
    ranking = rank(scores_N)
    count = int(torch.argmax((ranking.share_N >= tau * (1 - ROUNDING)).int())) + 1
    return ranking.ids_N[:count].sort().values


def top(values_N: torch.Tensor, count: int) -> torch.Tensor:
    """Ids, int64 ascending, of the `count` candidates with the largest values, ties by id.

    values_N: [N] by latent id, of either sign. Raises ValueError if a value is not finite or there are fewer
    candidates.
    """
    values_N = torch.as_tensor(values_N).detach().cpu().double().numpy()
    if not np.isfinite(values_N).all():
        raise ValueError("a candidate is ranked by a value that is not finite")
    if not 0 <= count <= values_N.size:
        raise ValueError(f"a core of {count} latents cannot be selected from {values_N.size} candidates")
    return torch.from_numpy(_falling(values_N)[:count]).sort().values


def _falling(values_N: np.ndarray) -> np.ndarray:
    """Ids by value descending, ties by id ascending, int64 [N]."""
    return np.lexsort((np.arange(values_N.size), -values_N))


def count_of(share: float, candidates: int) -> int:
    """The fewest candidates that are at least this share of all."""
    return math.ceil(share * candidates * (1 - ROUNDING))


def carried(scores_N: torch.Tensor, ids_C: torch.Tensor) -> float:
    """Share of the candidates' total score that these carry, added in the order of `rank`. Raises ValueError as `rank`
    does.
    """
    ranking = rank(scores_N)
    chosen_N = torch.isin(ranking.ids_N, torch.as_tensor(ids_C, dtype=torch.int64))
    # numpy adds a running sum one by one, as in `rank`: the top candidates carry exactly their point of the curve.
    running_N = np.cumsum(torch.where(chosen_N, ranking.scores_N, 0.0).numpy())
    return float(running_N[-1] / np.cumsum(ranking.scores_N.numpy())[-1])


def jaccard(kept: int, old_size: int, new_size: int) -> float | None:
    """Overlap of two consecutive cores: members of both / members of either; None if both are empty."""
    assert 0 <= kept <= min(old_size, new_size), "more members kept than there were"
    union = old_size + new_size - kept
    return kept / union if union else None
