"""What one shard of tokens adds to the candidates' attribution: all that any aggregator needs.

Letters: P candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.attribution.histogram import Histogram


@dataclass(frozen=True, eq=False)
class Partial:
    """Sums and counts over the rows of a shard. Tensors are on the CPU."""

    tokens: int
    """rows that counted, active or not"""
    signed_P: torch.Tensor
    """sum of a_j(n), fp64"""
    absolute_P: torch.Tensor
    """sum of |a_j(n)|, fp64"""
    histogram: Histogram
    """of |a_j(n)|, over the rows on which latent j is active"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a file holds it."""
        return {
            "tokens": torch.tensor(self.tokens),
            "signed": self.signed_P,
            "absolute": self.absolute_P,
            "filled": self.histogram.filled_N,
            "counts": self.histogram.counts_N,
        }

    @staticmethod
    def of_tensors(tensors: dict[str, torch.Tensor]) -> Partial:
        histogram = Histogram(tensors["filled"], tensors["counts"])
        return Partial(int(tensors["tokens"]), tensors["signed"], tensors["absolute"], histogram)
