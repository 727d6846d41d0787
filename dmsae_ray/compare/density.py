"""Matched density: free latents as dense as the cores' members, what any latents of such SAEs share.

Shape letters: N free latents, C core size, D model dimension, F width, R rows of activations, U drawn latents.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
import torch

from dmsae_ray.compare import activation
from dmsae_ray.compare.match import Rows, assign, cosines, mmcs, overlap, pw_mcc
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.nulls import MMCS_ROWS, NullResult, drawn, over_draws, unavailable
from dmsae_ray.draws import DENSITY_NULL

NEAREST = 5
"""Matched-density draws choose among so many free latents nearest in log-density: near, and yet many different draws.
"""
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
        return (
            f"has {self.free_N.size} free latents that are alive, fewer than the {self.core_C.size} members of its core"
        )

    def draw_all(self, draws: int, rng: np.random.Generator) -> tuple[list[np.ndarray], float]:
        """Latent ids of every draw, in the order of the core's members, and exp of the mean |log ratio| of densities
        over all draws.
        """
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
    return (
        f"the free latents nearest in density to the core's differ from them by a factor of {gap:.2g}, more than "
        f"{LARGEST_GAP:g}"
    )


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


@dataclass(frozen=True, eq=False)
class FreeDraws:
    """All draws of one SAE's free latents: made once, and read against every other SAE's."""

    size: int
    """latents in a draw: the core's"""
    latents: MeasuredLatents
    """every latent that occurs in a draw, [U]; those of the first `activation.DRAWS` draws come first"""
    places: tuple[np.ndarray, ...]
    """each draw as places among them, int64 [C]"""
    activations: activation.Standardised
    """of the latents that come first, on held-out rows"""
    representative: np.ndarray
    """MMCS_ROWS places over all draws, which stand for them in a mean of largest cosines"""
    gap: float
    """typical ratio of a drawn latent's density to its core latent's"""
    lack: str | None
    """why there is no draw, if there is none"""

    @staticmethod
    def of(sae: MeasuredLatents, core_ids_C: torch.Tensor, draws: int, seed: int, rows_RD: torch.Tensor) -> FreeDraws:
        """rows_RD: held-out rows, raw units, on which the first draws' activations are compared."""
        densities = Densities.split(sae.density_N, core_ids_C)
        size, nothing = densities.core_C.size, np.zeros(0, dtype=np.int64)
        if lack := densities.lack():
            return FreeDraws(
                size,
                sae.take(nothing),
                (),
                activation.standardised(sae.take(nothing), rows_RD),
                nothing,
                math.nan,
                lack,
            )
        # Two SAEs that began alike must not be drawn from alike, so the densities themselves are part of the seed.
        own = int.from_bytes(hashlib.sha256(sae.density_N.double().numpy().tobytes()).digest()[:8])
        rng = np.random.default_rng([seed, DENSITY_NULL, own])
        ids, gap = densities.draw_all(draws, rng)
        first = np.unique(np.concatenate(ids[: activation.DRAWS]))
        taken = np.concatenate([first, np.setdiff1d(np.concatenate(ids), first)])
        place_F = np.full(sae.size, -1)
        place_F[taken] = np.arange(taken.size)
        representative = rng.choice(place_F[np.concatenate(ids)], MMCS_ROWS) if size else nothing
        return FreeDraws(
            size,
            sae.take(taken),
            tuple(place_F[one] for one in ids),
            activation.standardised(sae.take(first), rows_RD),
            representative,
            gap,
            None,
        )


def matched_density_null(a: FreeDraws, b: FreeDraws, whole_a_FD: Rows, whole_b_FD: Rows, cosine: float) -> NullResult:
    """Free latents of the same two SAEs, as dense as the cores' members.

    Draw i of one side meets draw i of the other. whole_a_FD, whole_b_FD: all decoder rows of the two SAEs, the targets
    of `mmcs_mean`.
    """
    size = (a.size, b.size)
    for side, draws in (("first", a), ("second", b)):
        if draws.lack:
            return unavailable(f"the {side} SAE {draws.lack}", size)
    decoder_UU = cosines(a.latents.W_dec_ND, b.latents.W_dec_ND)
    encoder_UU = cosines(a.latents.W_enc_ND, b.latents.W_enc_ND)
    scores, overlaps, activations = [], [], []
    for draw, (left_C, right_C) in enumerate(zip(a.places, b.places, strict=True)):
        block = np.ix_(left_C, right_C)
        decoder = assign(decoder_UU[block])
        scores.append(drawn(pw_mcc(decoder)))
        overlaps.append(drawn(overlap(assign(encoder_UU[block]), decoder, cosine)))
        if draw < activation.DRAWS:
            pairs = replace(decoder, left_P=left_C[decoder.left_P], right_P=right_C[decoder.right_P])
            activations.append(activation.agreement(a.activations, b.activations, pairs).mean)
    both = [
        drawn(mmcs(own.latents.W_dec_ND[own.representative], other))
        for own, other in ((a, whole_b_FD), (b, whole_a_FD))
    ]
    gap = max(a.gap, b.gap)
    return over_draws(scores, overlaps, activations, float(np.mean(both)), size, reason=too_far(gap), density_gap=gap)
