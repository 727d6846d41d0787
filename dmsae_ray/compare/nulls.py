"""Nulls: what the agreement of two cores would be without a common core. Each is drawn at the cores' own sizes.

Shape letters: N and M latents of the two sides, C core size, D model dimension, F width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
import torch

from dmsae_ray.compare.match import Rows, hungarian, mmcs, overlap, pw_mcc

NEAREST = 5
"""Matched-density draws choose among so many free latents nearest in log-density: near, and yet many different draws."""
LARGEST_GAP = 2.0
"""Typical ratio of densities beyond which free latents are no comparison for a core."""
MMCS_ROWS = 1000
"""Rows that stand for all draws in a mean of largest cosines: its error is then under 0.01, and whole dictionaries are wide."""


@dataclass(frozen=True)
class NullResult:
    """One null of one pair. A number is None where it could not be made; `reason` then says why."""

    available: bool
    """whether the pair may be read against this null; where not, numbers that exist are given all the same"""
    reason: str | None
    """why it is not available"""
    mean: float | None
    """mean PW-MCC over draws"""
    p99: float | None
    """99th percentile of PW-MCC over draws; the value itself where there is one draw"""
    overlap_mean: float | None
    """mean overlap over draws"""
    overlap_p99: float | None
    """99th percentile of the overlap over draws; the value itself where there is one draw"""
    mmcs_mean: float | None
    """mean, over both directions, of the largest cosine to any latent of the other run's whole SAE"""
    draws: int
    """number of draws"""
    size: tuple[int, int]
    """latents on both sides in a draw"""
    density_gap: float | None = None
    """matched density only: typical ratio of a drawn latent's density to its core latent's, on the worse side"""
    core_pw_mcc_same_size: float | None = None
    """cycle 0 only: PW-MCC of the cores cut to `size` by score"""
    core_overlap_same_size: float | None = None
    """cycle 0 only: overlap of the cores cut to `size` by score"""


@dataclass(frozen=True, eq=False)
class Latents:
    """Rows of some latents of one SAE, in both directions."""

    W_enc_ND: Rows
    """encoder rows"""
    W_dec_ND: Rows
    """decoder rows"""

    @property
    def size(self) -> int:
        return self.W_dec_ND.shape[0]

    def take(self, index_C) -> Latents:
        """The latents at these indices."""
        return Latents(self.W_enc_ND[index_C], self.W_dec_ND[index_C])


def unavailable(reason: str, size: tuple[int, int]) -> NullResult:
    """A null without numbers."""
    return NullResult(False, reason, None, None, None, None, None, 0, size)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Directions with the activations' covariance."""

    deviation_D: np.ndarray
    """standard deviation along each eigenvector"""
    vectors_DD: np.ndarray
    """eigenvectors, one per column"""

    @property
    def d(self) -> int:
        return self.deviation_D.size

    @staticmethod
    def of(cov_DD: Rows) -> Gaussian:
        """Raises ValueError unless cov_DD is a finite, symmetric matrix other than zero."""
        if isinstance(cov_DD, torch.Tensor):
            cov_DD = cov_DD.detach().cpu().numpy()
        cov_DD = np.asarray(cov_DD, dtype=np.float64)
        if cov_DD.ndim != 2 or cov_DD.shape[0] != cov_DD.shape[1]:
            raise ValueError(f"covariance has shape {cov_DD.shape}, needs a square matrix")
        largest = np.abs(cov_DD).max(initial=0)
        if not np.isfinite(largest) or largest == 0 or np.abs(cov_DD - cov_DD.T).max() > 1e-6 * largest:
            raise ValueError("covariance is not a finite, symmetric matrix other than zero")
        values_D, vectors_DD = np.linalg.eigh(cov_DD)
        return Gaussian(np.sqrt(np.clip(values_D, 0, None)), vectors_DD)  # rounding gives tiny negative eigenvalues

    def rotated(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Directions in the eigenbasis, fp64 [count, D]: their cosines to each other are the same in any basis."""
        return rng.standard_normal((count, self.d)) * self.deviation_D

    def directions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Directions in the activations' own basis, fp64 [count, D]."""
        return self.rotated(rng, count) @ self.vectors_DD.T


def covariance_null(
    gaussian: Gaussian, size: tuple[int, int], whole_a_FD: Rows, whole_b_FD: Rows, draws: int, cosine: float, seed: int
) -> NullResult:
    """Gaussian directions with the activations' covariance: what the shape of the data alone gives.

    A draw has one direction per latent, used as its encoder row and as its decoder row: both matchings then always agree,
    so that the overlap of this null is larger, and the null stricter, than with two independent directions.
    whole_a_FD, whole_b_FD: all decoder rows of the two SAEs, the target of `mmcs_mean`.
    """
    rng = np.random.default_rng([seed, 0])
    scores, overlaps = [], []
    for _ in range(draws):
        matching = hungarian(gaussian.rotated(rng, size[0]), gaussian.rotated(rng, size[1]))
        scores.append(pw_mcc(matching))
        overlaps.append(overlap(matching, matching, cosine))
    directions_ND = gaussian.directions(rng, MMCS_ROWS)
    both = [mmcs(directions_ND, whole_b_FD), mmcs(directions_ND, whole_a_FD)]
    return _over_draws(scores, overlaps, float(np.mean(both)), size)


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
    def split(density_F: np.ndarray, core_ids_C: np.ndarray) -> Densities:
        """density_F: share of evaluation tokens on which each latent is active. Dead latents are never drawn.

        A core member that is silent on these tokens counts with the smallest density that is not 0.
        """
        density_F = np.asarray(density_F, dtype=np.float64)
        outside_F = np.ones(density_F.size, dtype=bool)
        outside_F[core_ids_C] = False
        free_ids_N = np.flatnonzero(outside_F & (density_F > 0))
        alive_F = density_F[density_F > 0]
        floor = alive_F.min() if alive_F.size else 1.0
        return Densities(np.maximum(density_F[core_ids_C], floor), free_ids_N, density_F[free_ids_N])


def matched_density_null(
    a: Latents, b: Latents, densities_a: Densities, densities_b: Densities, draws: int, cosine: float, seed: int
) -> NullResult:
    """Free latents of the same two SAEs, as dense as the cores' members: what any latents of such SAEs share.

    a, b: all latents of the two SAEs. Free are the latents outside the selected core.
    """
    size = (densities_a.core_C.size, densities_b.core_C.size)
    for side, densities in (("first", densities_a), ("second", densities_b)):
        if densities.free_N.size < densities.core_C.size:
            return unavailable(
                f"the {side} SAE has {densities.free_N.size} free latents that are alive, fewer than the "
                f"{densities.core_C.size} members of its core", size,
            )  # fmt: skip
    rng = np.random.default_rng([seed, 1])
    drawn_a, gap_a = _draw_all(densities_a, draws, rng)
    drawn_b, gap_b = _draw_all(densities_b, draws, rng)
    scores, overlaps = [], []
    for ids_a, ids_b in zip(drawn_a, drawn_b, strict=True):
        A, B = a.take(ids_a), b.take(ids_b)
        decoder = hungarian(A.W_dec_ND, B.W_dec_ND)
        scores.append(pw_mcc(decoder))
        overlaps.append(overlap(hungarian(A.W_enc_ND, B.W_enc_ND), decoder, cosine))
    both = [
        mmcs(own.W_dec_ND[rng.choice(np.concatenate(drawn), MMCS_ROWS)], other.W_dec_ND)
        for own, drawn, other in ((a, drawn_a, b), (b, drawn_b, a))
    ]
    gap = max(gap_a, gap_b)
    reason = None
    if gap > LARGEST_GAP:
        reason = (
            f"the free latents nearest in density to the core's differ from them by a factor of {gap:.2g}, "
            f"more than {LARGEST_GAP:g}"
        )
    return _over_draws(scores, overlaps, float(np.mean(both)), size, reason=reason, density_gap=gap)


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


def _draw_all(densities: Densities, draws: int, rng: np.random.Generator) -> tuple[list[np.ndarray], float]:
    """Latent ids of every draw, and exp of the mean |log ratio| of densities over all draws."""
    ids, gaps = [], []
    for _ in range(draws):
        picks_C = draw_matched(densities.core_C, densities.free_N, rng)
        ids.append(densities.free_ids_N[picks_C])
        gaps.append(np.abs(np.log(densities.free_N[picks_C] / densities.core_C)).mean())
    return ids, math.exp(float(np.mean(gaps)))


def cycle0_null(
    start_a: Latents, start_b: Latents, core_a: Latents, core_b: Latents, cosine: float, whole_a_FD: Rows | None = None,
    whole_b_FD: Rows | None = None,
) -> NullResult:  # fmt: skip
    """Top-attribution latents of cycle 0 at the cores' sizes: what a Matryoshka SAE gives without distillation.

    start_a, start_b: cycle 0's candidates, core_a, core_b: the cores' members, all by score descending. Where cycle 0 has
    fewer candidates than the core has members, all of them are used, and the cores cut to those sizes stand beside them.
    whole_a_FD, whole_b_FD: all decoder rows of cycle 0's SAEs, for `mmcs_mean`; without them it is None.
    """
    size = (min(start_a.size, core_a.size), min(start_b.size, core_b.size))
    if min(size) == 0:
        return unavailable("cycle 0 has no candidates on one side", size)
    A, B = start_a.take(slice(size[0])), start_b.take(slice(size[1]))
    cut_a, cut_b = core_a.take(slice(size[0])), core_b.take(slice(size[1]))
    decoder, core_decoder = hungarian(A.W_dec_ND, B.W_dec_ND), hungarian(cut_a.W_dec_ND, cut_b.W_dec_ND)
    mmcs_mean = None
    if whole_a_FD is not None and whole_b_FD is not None:
        mmcs_mean = (mmcs(A.W_dec_ND, whole_b_FD) + mmcs(B.W_dec_ND, whole_a_FD)) / 2
    result = _over_draws(
        [pw_mcc(decoder)], [overlap(hungarian(A.W_enc_ND, B.W_enc_ND), decoder, cosine)], mmcs_mean, size
    )
    return replace(
        result,
        core_pw_mcc_same_size=pw_mcc(core_decoder),
        core_overlap_same_size=overlap(hungarian(cut_a.W_enc_ND, cut_b.W_enc_ND), core_decoder, cosine),
    )


def _over_draws(
    scores: list[float], overlaps: list[float], mmcs_mean: float | None, size: tuple[int, int],
    reason: str | None = None, density_gap: float | None = None,
) -> NullResult:  # fmt: skip
    return NullResult(
        available=reason is None, reason=reason,
        mean=float(np.mean(scores)), p99=float(np.quantile(scores, 0.99)),
        overlap_mean=float(np.mean(overlaps)), overlap_p99=float(np.quantile(overlaps, 0.99)),
        mmcs_mean=mmcs_mean, draws=len(scores), size=size, density_gap=density_gap,
    )  # fmt: skip
