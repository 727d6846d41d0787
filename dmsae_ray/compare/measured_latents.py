"""Latents as they are compared: with their densities, on raw rows.

Shape letters: N latents, D model dimension, F width, C chosen latents, R rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dmsae_ray.sae.latents import Latents
from dmsae_ray.sae.sae import MatryoshkaSAE


@dataclass(frozen=True, eq=False)
class MeasuredLatents(Latents):
    """Some or all latents of an SAE that was evaluated. Raises ValueError if the shapes are not of one SAE."""

    density_N: torch.Tensor
    """share of evaluation tokens on which each is active"""
    scale: float
    """divisor of the raw activations that the SAE reads"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("density_N", (self.size,))

    @staticmethod
    def of(sae: MatryoshkaSAE, density_F: torch.Tensor, scale: float) -> MeasuredLatents:
        """All latents of an SAE, sharing its memory."""
        whole = Latents.all_of(sae)
        return MeasuredLatents(
            whole.W_enc_ND,
            whole.b_enc_N,
            whole.W_dec_ND,
            whole.b_dec_D,
            whole.theta_N,
            torch.as_tensor(density_F),
            scale,
        )

    def take(self, index_C: torch.Tensor | np.ndarray | slice) -> MeasuredLatents:
        """The latents at these indices."""
        if isinstance(index_C, np.ndarray):
            index_C = torch.from_numpy(index_C)
        return MeasuredLatents(
            self.W_enc_ND[index_C],
            self.b_enc_N[index_C],
            self.W_dec_ND[index_C],
            self.b_dec_D,
            self.theta_N[index_C],
            self.density_N[index_C],
            self.scale,
        )

    def activations(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """What the inference rule gives on these rows, [R, N]. rows_RD: raw units, any precision."""
        return self.encode(rows_RD.to(self.W_enc_ND.dtype) / self.scale)
