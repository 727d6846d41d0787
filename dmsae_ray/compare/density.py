"""Matched density: free latents as dense as the cores' members, what any latents of such SAEs share.

Shape letters: N free latents, C core size, D model dimension, F width, R rows of activations.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from dmsae_ray.compare import activation
from dmsae_ray.compare.latents import Latents
from dmsae_ray.compare.match import hungarian, mmcs, overlap, pw_mcc
from dmsae_ray.compare.nulls import MMCS_ROWS, NullResult, over_draws, unavailable

NEAREST = 5
"""Matched-density draws choose among so many free latents nearest in log-density: near, and yet many different draws."""
LARGEST_GAP = 2.0
"""Typical ratio of densities beyond which free latents are no comparison for a core."""


@dataclass(frozen=True, eq=False)
class Densities:
    """One SAE's densities, split into its selected core and the rest."""

    core_C: np.ndarray
    """densities of the core's members"""
    free_ids_N: np.ndarray
    """ids of the latents outside the core that are alive"""
    free_N: np.ndarray
    """their densities, all above 0"""

    @staticmethod
    def split(density_F: np.ndarray | torch.Tensor, core_ids_C: np.ndarray | torch.Tensor) -> Densities:
        """density_F: share of evaluation tokens on which each latent is active. Dead latents are never drawn.

        A core member that is silent on these tokens counts with the smallest density that is not 0.
        """
        density_F = np.asarray(density_F, dtype=np.float64)
        core_ids_C = np.asarray(core_ids_C)
        outside_F = np.ones(density_F.size, dtype=bool)
        outside_F[core_ids_C] = False
        free_ids_N = np.flatnonzero(outside_F & (density_F > 0))
        alive_F = density_F[density_F > 0]
        floor = alive_F.min() if alive_F.size else 1.0
        return Densities(np.maximum(density_F[core_ids_C], floor), free_ids_N, density_F[free_ids_N])

    def lack(self) -> str | None:
        """Why there is no draw, if there is none."""
        if self.free_N.size >= self.core_C.size:
            return None
        return f"has {self.free_N.size} free latents that are alive, fewer than the {self.core_C.size} members of its core"

    def draw_all(self, draws: int, rng: np.random.Generator) -> tuple[list[np.ndarray], float]:
        """Latent ids of every draw, each in the order of the core's members, and exp of the mean |log ratio| of densities over all draws."""
        ids, gaps = [], []
        for _ in range(draws):
            picks_C = draw_matched(self.core_C, self.free_N, rng)
            ids.append(self.free_ids_N[picks_C])
            gaps.append(np.abs(np.log(self.free_N[picks_C] / self.core_C)))
        return ids, math.exp(float(np.mean(gaps))) if self.core_C.size else 1.0


def too_far(gap: float) -> str | None:
    """Why draws with this gap are no comparison, if they are none."""
    if gap <= LARGEST_GAP:
        return None
    return f"the free latents nearest in density to the core's differ from them by a factor of {gap:.2g}, more than {LARGEST_GAP:g}"


def draw_matched(core_C: np.ndarray, free_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw without replacement: an index into `free_N` for every core density, int64 [C].

    Core members are visited in random order; each takes one of the NEAREST remaining free densities by log-ratio.
    """
    shuffled_N = rng.permutation(free_N.size)  # ties in density are then broken anew in every draw
    order_N = shuffled_N[np.argsort(free_N[shuffled_N], kind="stable")]
    values, ids = np.log(free_N[order_N]).tolist(), order_N.tolist()
    picks_C = np.empty(core_C.size, dtype=np.int64)
    targets_C, chances_C = np.log(core_C).tolist(), rng.random(core_C.size).tolist()
    for member in rng.permutation(core_C.size).tolist():
        target = targets_C[member]
        at = bisect_left(values, target)
        window = range(max(0, at - NEAREST), min(len(values), at + NEAREST))
        near = sorted(window, key=lambda i: abs(values[i] - target))[:NEAREST]
        chosen = near[int(chances_C[member] * len(near))]
        picks_C[member] = ids.pop(chosen)
        del values[chosen]
    return picks_C


def matched_density_null(
    a: Latents, b: Latents, densities_a: Densities, densities_b: Densities, draws: int, cosine: float, seed: int, rows_RD: torch.Tensor
) -> NullResult:
    """Free latents of the same two SAEs, as dense as the cores' members.

    a, b: all latents of the two SAEs; free are those outside the selected core. rows_RD: held-out rows, raw units; the activations of
    the first `activation.DRAWS` draws are compared on them.
    """
    size = (densities_a.core_C.size, densities_b.core_C.size)
    for side, densities in (("first", densities_a), ("second", densities_b)):
        if lack := densities.lack():
            return unavailable(f"the {side} SAE {lack}", size)
    rng = np.random.default_rng([seed, 1])
    drawn_a, gap_a = densities_a.draw_all(draws, rng)
    drawn_b, gap_b = densities_b.draw_all(draws, rng)
    scores, overlaps, activations = [], [], []
    for draw, (ids_a, ids_b) in enumerate(zip(drawn_a, drawn_b, strict=True)):
        A, B = a.take(ids_a), b.take(ids_b)
        decoder = hungarian(A.W_dec_ND, B.W_dec_ND)
        scores.append(pw_mcc(decoder))
        overlaps.append(overlap(hungarian(A.W_enc_ND, B.W_enc_ND), decoder, cosine))
        if draw < activation.DRAWS:
            left_RN, right_RN = activation.standardised(A, rows_RD), activation.standardised(B, rows_RD)
            activations.append(activation.agreement(left_RN, right_RN, decoder).mean)
    both = [
        mmcs(own.W_dec_ND[rng.choice(np.concatenate(drawn), MMCS_ROWS)], other.W_dec_ND)
        for own, drawn, other in ((a, drawn_a, b), (b, drawn_b, a))
    ]
    gap = max(gap_a, gap_b)
    return over_draws(scores, overlaps, activations, float(np.mean(both)), size, reason=too_far(gap), density_gap=gap)
