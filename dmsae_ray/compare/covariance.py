"""Gaussian directions with the activations' covariance: the agreement that the shape of the data alone gives.

Shape letters: D model dimension, F width, R rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from dmsae_ray.compare.match import Rows, hungarian, mmcs, overlap, pw_mcc
from dmsae_ray.compare.nulls import MMCS_ROWS, DictionaryNull, NullResult, drawn, over_draws
from dmsae_ray.draws import COVARIANCE_NULL, DICTIONARY_NULL, MMCS_NULL

PART = 16_384
"""Rows turned into fp64 at a time."""


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

    @staticmethod
    def of_rows(rows_RD: torch.Tensor) -> Gaussian:
        """From the activations themselves, of any scale: a direction has none."""
        mean_D = sum(part_RD.double().sum(dim=0) for part_RD in rows_RD.split(PART)) / len(rows_RD)
        parts = (part_RD.double() - mean_D for part_RD in rows_RD.split(PART))
        return Gaussian.of(sum(part_RD.T @ part_RD for part_RD in parts) / len(rows_RD))

    def rotated(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Directions in the eigenbasis, fp64 [count, D]: their cosines to each other are the same in any basis."""
        return rng.standard_normal((count, self.d)) * self.deviation_D

    def directions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Directions in the activations' own basis, fp64 [count, D]."""
        return self.rotated(rng, count) @ self.vectors_DD.T


class CovarianceNull:
    """The null, for pairs of any sizes. What two pairs of the same sizes have in common is drawn once, from its own
    seed: a result does not depend on what was asked before."""

    def __init__(self, gaussian: Gaussian, draws: int, cosine: float, seed: int):
        self.gaussian, self.draws, self.cosine, self.seed = gaussian, draws, cosine, seed
        self._scores = lru_cache(maxsize=None)(self._draw)
        self._whole = lru_cache(maxsize=None)(self._draw_whole)

    def of(self, size: tuple[int, int], mmcs_a: float, mmcs_b: float) -> NullResult:
        """A draw has one direction per latent, used as its encoder row and as its decoder row: both matchings then
        always agree, so that the overlap of this null is larger, and the null stricter, than with two independent
        directions.

        mmcs_a, mmcs_b: what `to_whole` gives for the two SAEs.
        """
        scores, overlaps = self._scores(*sorted(size))
        return over_draws(scores, overlaps, [], (mmcs_a + mmcs_b) / 2, size)

    def to_whole(self, whole_FD: Rows) -> float:
        """Mean of the directions' largest cosine to any decoder row of an SAE."""
        return drawn(mmcs(self.gaussian.directions(np.random.default_rng([self.seed, MMCS_NULL]), MMCS_ROWS), whole_FD))

    def dictionary(self, size: tuple[int, int]) -> DictionaryNull:
        """One draw of whole dictionaries."""
        return DictionaryNull(True, None, self._whole(*sorted(size)), 1, size)

    def _draw(self, smaller: int, larger: int) -> tuple[list[float], list[float]]:
        rng = np.random.default_rng([self.seed, COVARIANCE_NULL])
        scores, overlaps = [], []
        for _ in range(self.draws):
            matching = hungarian(self.gaussian.rotated(rng, smaller), self.gaussian.rotated(rng, larger))
            scores.append(drawn(pw_mcc(matching)))
            overlaps.append(drawn(overlap(matching, matching, self.cosine)))
        return scores, overlaps

    def _draw_whole(self, smaller: int, larger: int) -> float | None:
        rng = np.random.default_rng([self.seed, DICTIONARY_NULL])
        return pw_mcc(hungarian(self.gaussian.rotated(rng, smaller), self.gaussian.rotated(rng, larger)))
