"""Subspaces: do two sets of directions span the same space, whatever basis each has of it?

Two cores can hold one subspace in different bases: no latent of one is a latent of the other, and yet the same part of
the stream is described. The mean squared cosine of the principal angles tells that from two that hold different things
(Bjorck and Golub, Mathematics of Computation 27, 1973).
Shape letters: N latents, D model dimension, r and s ranks, C core size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dmsae_ray.compare.covariance import Gaussian
from dmsae_ray.compare.match import Rows, unit
from dmsae_ray.draws import SUBSPACE_NULL

SMALLEST_SHARE = 1e-3
"""A direction counts in a span if its singular value is at least this share of the largest: what is left when a row is
all but a sum of others is rounding.
"""
DRAWS = 50
"""Draws of random subspaces at most: a mean over many angles hardly varies between draws."""


def span(rows_ND: Rows) -> np.ndarray:
    """An orthonormal basis of what these rows span, fp64 [D, r]; rows are scaled to norm 1 first."""
    unit_ND = unit(rows_ND)
    values_N, vectors_NN = np.linalg.eigh(unit_ND @ unit_ND.T)  # N is small beside D, as a rule
    largest = values_N.max(initial=0.0)
    kept_N = values_N > SMALLEST_SHARE**2 * largest
    return unit_ND.T @ (vectors_NN[:, kept_N] / np.sqrt(values_N[kept_N]))


def agreement(left_Dr: np.ndarray, right_Ds: np.ndarray) -> float | None:
    """Mean squared cosine of the principal angles between two spans, over min(r, s) angles; None if one is empty.

    1: one lies within the other; 0: they are at right angles. Isotropic random subspaces give max(r, s) / D.
    """
    least = min(left_Dr.shape[1], right_Ds.shape[1])
    return min(1.0, float(np.square(left_Dr.T @ right_Ds).sum()) / least) if least else None


class RandomSubspaces:
    """Spans of directions with the activations' covariance, for pairs of any sizes; drawn once for each two sizes."""

    def __init__(self, gaussian: Gaussian, draws: int, seed: int):
        self.gaussian, self.draws, self.seed = gaussian, min(draws, DRAWS), seed
        self._drawn = lru_cache(maxsize=None)(self._draw)

    def of(self, size: tuple[int, int]) -> Sequence[float]:
        """Agreement of each draw. size: directions on both sides, at least 1."""
        return self._drawn(*sorted(size))

    def _draw(self, smaller: int, larger: int) -> Sequence[float]:
        rng = np.random.default_rng([self.seed, SUBSPACE_NULL])
        found = []
        for _ in range(self.draws):
            left, right = (span(self.gaussian.rotated(rng, size)) for size in (smaller, larger))
            found.append(agreement(left, right))
        return [value for value in found if value is not None]
