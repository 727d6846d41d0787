"""Latents of one SAE: their rows in both directions and what their activations need.

Shape letters: N latents, D model dimension, R rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dmsae_ray.sae.sae import MatryoshkaSAE, active


@dataclass(frozen=True, eq=False)
class Latents:
    """Some or all latents of an SAE. Raises ValueError if the shapes are not of one SAE."""

    W_enc_ND: torch.Tensor
    """encoder rows, the frozen ones included"""
    W_dec_ND: torch.Tensor
    """decoder rows"""
    b_enc_N: torch.Tensor
    """encoder biases"""
    theta_N: torch.Tensor
    """inference thresholds: the SAE's one, or 0 for the latents of an exempt core"""
    density_N: torch.Tensor
    """share of evaluation tokens on which each is active"""
    b_dec_D: torch.Tensor
    """decoder bias of the SAE"""
    scale: float
    """divisor of the raw activations that the SAE reads"""

    def __post_init__(self) -> None:
        count, d = self.W_dec_ND.shape
        for name, shape in (
            ("W_enc_ND", (count, d)),
            ("b_enc_N", (count,)),
            ("theta_N", (count,)),
            ("density_N", (count,)),
            ("b_dec_D", (d,)),
        ):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, W_dec_ND asks for {shape}: not of one SAE"
                )

    @staticmethod
    def of(sae: MatryoshkaSAE, density_F: torch.Tensor, scale: float) -> Latents:
        """All latents of an SAE, sharing its memory."""
        return Latents(
            sae.encoder_rows().detach(),
            sae.W_dec.detach(),
            sae.b_enc.detach(),
            sae.thresholds(),
            torch.as_tensor(density_F),
            sae.b_dec.detach(),
            scale,
        )

    @property
    def size(self) -> int:
        return self.W_dec_ND.shape[0]

    def take(self, index_C: torch.Tensor | np.ndarray | slice) -> Latents:
        """The latents at these indices."""
        if isinstance(index_C, np.ndarray):
            index_C = torch.from_numpy(index_C)
        return Latents(
            self.W_enc_ND[index_C],
            self.W_dec_ND[index_C],
            self.b_enc_N[index_C],
            self.theta_N[index_C],
            self.density_N[index_C],
            self.b_dec_D,
            self.scale,
        )

    def activations(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """What the inference rule gives on these rows, [R, N]. rows_RD: raw units, any precision."""
        x_RD = rows_RD.to(self.W_enc_ND.dtype) / self.scale
        p_RN = torch.nn.functional.linear(x_RD - self.b_dec_D, self.W_enc_ND, self.b_enc_N)
        return active(p_RN, self.theta_N)
