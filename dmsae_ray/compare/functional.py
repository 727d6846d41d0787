"""Functional agreement: do matched latents fire on the same tokens, do the same to the loss, and weigh alike; and do
latents without a partner describe the same subspace?

Cosines tell which way latents point. This tells what they are used for; each number stands beside what it would be by
chance, since dense latents overlap and large gradients are shared whatever two latents are.
Shape letters: R rows of activations, M rows with a gradient of the loss, N latents, D model dimension, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmsae_ray.compare.activation import PART, Standardised, standardised_values
from dmsae_ray.compare.activation import agreement as correlation
from dmsae_ray.compare.match import Matching
from dmsae_ray.compare.measured_latents import MeasuredLatents

MEASURES = ("firing", "effect", "importance", "subspace")
"""What is measured of a pair, each with chance beside it."""
NULLS = {
    "permuted": ("firing", "effect", "importance"),
    "matched_density": ("firing", "effect", "subspace"),
    "covariance": ("subspace",),
    "cycle0": ("firing", "effect", "subspace"),
}
"""Nulls, and what each has a number of."""
CHANCE = ("permuted", "matched_density", "covariance")
"""Those that are chance; cycle 0's sets are no chance, but what a plain Matryoshka SAE gives."""
DRAWS_FOR_P99 = 100
"""Fewer draws have no 99th percentile: the largest then stands for it."""


@dataclass(frozen=True, eq=False)
class LossRows:
    """Held-out rows with the gradient of the language model's loss, undisturbed, at each."""

    x_MD: torch.Tensor
    """rows, raw units"""
    gradient_MD: torch.Tensor
    """of the summed next-token cross-entropy of the row's sequence, nats per raw unit"""


@dataclass(frozen=True)
class FunctionalNull:
    """One null of one pair. A number is None where this null has none, or it could not be made."""

    available: bool
    """whether the pair may be read against it"""
    reason: str | None
    """why not"""
    draws: int
    """draws of `firing`, `effect` and `importance`"""
    firing: float | None = None
    """mean over draws; nulls of chance are put at the pair's own densities: its `firing_chance`, and how far a draw is
    above its own
    """
    firing_bar: float | None = None
    """what a pair has to exceed: 99th percentile over draws; with fewer than DRAWS_FOR_P99 the largest"""
    effect: float | None = None
    effect_bar: float | None = None
    importance: float | None = None
    importance_bar: float | None = None
    subspace: float | None = None
    subspace_bar: float | None = None
    subspace_draws: int = 0
    """draws of `subspace`"""


@dataclass(frozen=True)
class Functional:
    """Functional agreement of two cores. A number is None where it could not be made."""

    matched: int
    """pairs of latents matched by decoder rows"""
    firing: float | None
    """mean Jaccard of the sets of held-out rows on which two latents, matched by decoder rows, are active"""
    firing_chance: float | None
    """what that mean would be if partners fired independently, as often as they do: pq / (p + q - pq)"""
    firing_pairs: int
    """matched pairs in those means"""
    firing_left_out: int
    """matched pairs of which neither is active on any row"""
    effect: float | None
    """mean, over matched pairs, of the correlation over tokens of their effects on the loss (`loss_effects`)"""
    effect_pairs: int
    """matched pairs in that mean"""
    effect_left_out: int
    """matched pairs of which one has no effect on any row"""
    effect_rows: int
    """held-out rows that effects are compared on; 0: gradients of the loss were not measured"""
    importance: float | None
    """Spearman correlation, over matched pairs, of the attribution scores by which their chains ranked them"""
    importance_pearson: float | None
    """the same as Pearson correlation of the scores themselves"""
    subspace: float | None
    """mean squared cosine of the principal angles between what the latents span that are not shared"""
    unmatched_a: int
    """members of the first core that are not shared"""
    unmatched_b: int
    subspace_isotropic: float | None
    """what random subspaces of these ranks give without any structure: the larger rank / D"""
    nulls: dict[str, FunctionalNull]
    """by the names of NULLS"""

    def beyond(self, measure: str) -> bool | None:
        """Whether a measure exceeds the bar of every null of chance that is available; None if there is none."""
        value = getattr(self, measure)
        bars = [
            bar
            for name in CHANCE
            if measure in NULLS[name]
            and self.nulls[name].available
            and (bar := getattr(self.nulls[name], f"{measure}_bar")) is not None
        ]
        return None if value is None or not bars else all(value > bar for bar in bars)

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> Functional:
        """The inverse of dataclasses.asdict. Raises TypeError on missing or unknown fields."""
        return Functional(**plain | {"nulls": {name: FunctionalNull(**null) for name, null in plain["nulls"].items()}})


def loss_effects(latents: MeasuredLatents, rows: LossRows) -> Standardised:
    """What each latent does to the loss at each row, to first order, with mean 0 and norm 1 over the rows.

        e_j(m) = z_j(m) * s * < dLoss / dx(m), d_j >

    Without the latent at that row, the loss of all later tokens changes by -e_j(m), as far as it is linear. The
    gradient is the undisturbed model's and the same for all SAEs, so that one pass of the model serves every latent.
    """
    effect_NM = torch.empty(latents.size, len(rows.x_MD), dtype=torch.float32)
    W_dec_DN = latents.W_dec_ND.T * latents.scale
    for x_mD, gradient_mD, part_Nm in zip(
        rows.x_MD.split(PART), rows.gradient_MD.split(PART), effect_NM.split(PART, dim=1), strict=True
    ):
        part_Nm.copy_((latents.activations(x_mD) * (gradient_mD.to(W_dec_DN.dtype) @ W_dec_DN)).T)
    return standardised_values(effect_NM)


@dataclass(frozen=True)
class Overlap:
    """How far the rows agree on which matched latents fire."""

    mean: float | None
    """mean Jaccard over the counted pairs; None if there is none"""
    chance: float | None
    """the same if partners fired independently"""
    counted: int
    """pairs of which one is active on some row"""
    left_out: int
    """pairs of which neither is"""

    @property
    def excess(self) -> float | None:
        return None if self.mean is None or self.chance is None else self.mean - self.chance


def overlap_of(left_PR: torch.Tensor, right_PR: torch.Tensor) -> Overlap:
    """left_PR, right_PR: on which rows partners are active, bool. Where one of two is silent they overlap by 0."""
    both_P = (left_PR & right_PR).sum(dim=1).double()
    a_P, b_P = left_PR.sum(dim=1).double(), right_PR.sum(dim=1).double()
    some_P = (a_P + b_P) > 0
    counted = int(some_P.sum())
    if not counted:
        return Overlap(None, None, 0, len(some_P))
    both_P, a_P, b_P = both_P[some_P], a_P[some_P], b_P[some_P]
    return Overlap(
        float(_jaccard(both_P, a_P, b_P).mean()),
        float(_chance(a_P, b_P, left_PR.shape[1]).mean()),
        counted,
        len(some_P) - counted,
    )


def firing(left: Standardised, right: Standardised, matching: Matching) -> Overlap:
    """Over matched pairs."""
    left_P, right_P = torch.from_numpy(matching.left_P), torch.from_numpy(matching.right_P)
    return overlap_of(left.fires_NR[left_P], right.fires_NR[right_P])


def effect(left: Standardised | None, right: Standardised | None, matching: Matching) -> float | None:
    """Mean correlation of effects over matched pairs; None where they were not measured."""
    return None if left is None or right is None else correlation(left, right, matching).mean


def excesses(left_PR: torch.Tensor, right_PR: torch.Tensor) -> np.ndarray:
    """Jaccard less what chance gives, of every latent of one side with every one of the other, fp64 [P, P]; NaN where
    neither is active.
    """
    both_PP = torch.zeros(len(left_PR), len(right_PR), dtype=torch.float64)
    for left_Pr, right_Pr in zip(left_PR.split(PART, dim=1), right_PR.split(PART, dim=1), strict=True):
        both_PP += (left_Pr.float() @ right_Pr.float().T).double()  # exact: a part has fewer rows than fp32 has digits
    a_P1, b_P = left_PR.sum(dim=1).double()[:, None], right_PR.sum(dim=1).double()
    return torch.where(
        a_P1 + b_P > 0, _jaccard(both_PP, a_P1, b_P) - _chance(a_P1, b_P, left_PR.shape[1]), torch.nan
    ).numpy()


def _jaccard(both: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of two sets, from the sizes of their intersection and of themselves."""
    return both / (a + b - both)


def _chance(a: torch.Tensor, b: torch.Tensor, rows: int) -> torch.Tensor:
    """The same, to first order, of independent sets of these sizes: pq / (p + q - pq)."""
    p, q = a / rows, b / rows
    return p * q / (p + q - p * q)


def correlations(left: Standardised, right: Standardised, left_P: torch.Tensor, right_P: torch.Tensor) -> np.ndarray:
    """Of every latent of one side with every one of the other, fp64 [P, P]; NaN where one is silent."""
    r_PP = (left.z_NR[left_P] @ right.z_NR[right_P].T).double().clip(-1, 1)
    alive_PP = left.alive_N[left_P][:, None] & right.alive_N[right_P]
    return torch.where(alive_PP, r_PP, torch.nan).numpy()


def pearson(a_P: np.ndarray, b_P: np.ndarray) -> float | None:
    """Correlation; None where all values of a side are equal."""
    a_P, b_P = a_P - a_P.mean(), b_P - b_P.mean()
    norm = float(np.sqrt(np.square(a_P).sum() * np.square(b_P).sum()))
    return float(a_P @ b_P) / norm if norm > 0 else None


def ranks(values_P: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values at their mean rank."""
    _, place_P, count = np.unique(values_P, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place_P]


def bar(values: Sequence[float]) -> float:
    """What a value has to exceed, see FunctionalNull."""
    return float(np.quantile(values, 0.99)) if len(values) >= DRAWS_FOR_P99 else max(values)


def drawn_numbers(**draws: Sequence[float | None]) -> dict[str, Any]:
    """Mean and bar of each measure over its draws, as fields of a FunctionalNull; draws without a number do not
    count.
    """
    found: dict[str, Any] = {}
    for measure, values in draws.items():
        known = [value for value in values if value is not None]
        if known:
            found |= {measure: float(np.mean(known)), f"{measure}_bar": bar(known)}
    return found
