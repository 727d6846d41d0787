"""How often each latent's attribution had which magnitude: integer counts in fixed buckets, so that they merge exactly.

The buckets are logarithmic: every octave from 2^LOWEST on is cut into STEPS of equal width, as the leading bits of a
float cut it, so that a value's bucket is read from its bits and no rounding of a logarithm decides it. Bucket 0 holds
what is smaller, zero included, and stands for 0; the last one holds what is larger.
Letters: M magnitudes, N filled buckets of all latents, K buckets, P latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOWEST, OCTAVES = -32, 48
"""From 2e-10 to 65 536 nats: beyond what a token's attribution is, and an absolute error of 2e-10 below."""
STEP_BITS = 4
STEPS = 1 << STEP_BITS
BUCKETS = 1 + OCTAVES * STEPS
RELATIVE_ERROR = 1 / (2 * STEPS + 1)
"""Largest relative difference, 0.0303, of a magnitude within the octaves and the value that its bucket stands for."""
MANTISSA_BITS, EXPONENT_BIAS = 23, 127
ROUNDING = 1e-12
"""Relative slack of a rank: nine of ten values are a share of 0.9 whatever the last bit of 0.9 * 10 says."""


def bucket_of(magnitude_M: torch.Tensor) -> torch.Tensor:
    """The bucket, int64 [M], of fp32 magnitudes >= 0."""
    leading_M = magnitude_M.contiguous().view(torch.int32).long() >> (MANTISSA_BITS - STEP_BITS)
    return (leading_M - ((LOWEST + EXPONENT_BIAS) << STEP_BITS) + 1).clamp(0, BUCKETS - 1)


def bucket_values() -> torch.Tensor:
    """What each bucket stands for, fp64 [K]: for one from a to b it is 2ab / (a + b), equally wrong, (b - a) / (b + a),
    at both ends.
    """
    index_K = torch.arange(BUCKETS - 1)
    octave_K = torch.exp2((LOWEST + index_K // STEPS).double())
    low_K = octave_K * (1 + (index_K % STEPS) / STEPS)
    high_K = low_K + octave_K / STEPS
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2 * low_K * high_K / (low_K + high_K)])


@dataclass(frozen=True, eq=False)
class Histogram:
    """The filled ones of P x K buckets. Most are empty: at width 65 536 all of them would be 400 MB for each shard."""

    filled_N: torch.Tensor
    """latent * BUCKETS + bucket, int64 [N], ascending"""
    counts_N: torch.Tensor
    """magnitudes in it, int64 [N]"""

    @staticmethod
    def of(latent_M: torch.Tensor, magnitude_M: torch.Tensor) -> Histogram:
        """Count fp32 magnitudes, each of one latent. The result is on the CPU."""
        filled_N, counts_N = torch.unique(latent_M * BUCKETS + bucket_of(magnitude_M), return_counts=True)
        return Histogram(filled_N.cpu(), counts_N.cpu())

    @staticmethod
    def merged(parts: Sequence[Histogram]) -> Histogram:
        """Of all their magnitudes together: the same whatever the order of the parts, or how the magnitudes were dealt
        to them.
        """
        filled_N, place = torch.unique(torch.cat([part.filled_N for part in parts]), return_inverse=True)
        return Histogram(
            filled_N, torch.zeros_like(filled_N).index_add_(0, place, torch.cat([part.counts_N for part in parts]))
        )

    def active(self, latents: int) -> torch.Tensor:
        """How many magnitudes each of P latents has, int64 [P]."""
        return torch.zeros(latents, dtype=torch.int64).index_add_(0, self.filled_N // BUCKETS, self.counts_N)

    def quantile(self, q: float, latents: int) -> torch.Tensor:
        """For each of P latents the smallest of its n magnitudes that at least q * n of them do not exceed, fp64 [P]; 0
        for none.

        The bucket is exact, the value within it is not: the relative error is at most RELATIVE_ERROR (3.03 %) for
        magnitudes from 2^-32 to 2^16; smaller ones count as 0.
        """
        active_P = self.active(latents)
        before_P = active_P.cumsum(0) - active_P
        rank_P = (q * active_P * (1 - ROUNDING)).ceil().long().clamp(min=1)
        # Filled buckets ascend by latent, then by magnitude: so do their running counts.
        found_P = torch.searchsorted(self.counts_N.cumsum(0), before_P + rank_P)
        bucket_P = torch.cat([self.filled_N, torch.zeros(1, dtype=torch.int64)])[found_P] % BUCKETS
        return torch.where(active_P > 0, bucket_values()[bucket_P], 0.0)
