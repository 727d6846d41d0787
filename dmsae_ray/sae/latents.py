"""Latents of one SAE, some or all: their rows in both directions and what their activations need.

Shape letters: N latents, D model dimension, F width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmsae_ray.sae.sae import MatryoshkaSAE, active


@dataclass(frozen=True, eq=False)
class Latents:
    """What `MatryoshkaSAE` computes these latents from. Raises ValueError if the shapes are not of one SAE."""

    W_enc_ND: torch.Tensor
    """encoder rows, the frozen ones included"""
    b_enc_N: torch.Tensor
    """encoder biases"""
    W_dec_ND: torch.Tensor
    """decoder rows"""
    b_dec_D: torch.Tensor
    """decoder bias of the SAE"""
    theta_N: torch.Tensor
    """inference thresholds: the SAE's one, or 0 for the latents of an exempt core"""

    def __post_init__(self) -> None:
        count, d = self.W_dec_ND.shape
        for name, shape in (
            ("W_enc_ND", (count, d)),
            ("b_enc_N", (count,)),
            ("b_dec_D", (d,)),
            ("theta_N", (count,)),
        ):
            self.expect(name, shape)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if that tensor has another shape."""
        if tuple(getattr(self, name).shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(getattr(self, name).shape)}, W_dec_ND asks for {shape}: not of one SAE"
            )

    @staticmethod
    def all_of(sae: MatryoshkaSAE) -> Latents:
        """All latents of an SAE, sharing its memory."""
        return Latents(
            sae.encoder_rows().detach(), sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach(), sae.thresholds()
        )

    @staticmethod
    def some_of(sae: MatryoshkaSAE, ids: Sequence[int], device: str | torch.device = "cpu") -> Latents:
        """Copies of these latents, in this order, on `device`: of a wide SAE, which may then go, a small part."""
        ids_N = torch.as_tensor(ids, dtype=torch.int64, device=sae.W_dec.device)
        whole = Latents.all_of(sae)
        parts = (
            whole.W_enc_ND[ids_N],
            whole.b_enc_N[ids_N],
            whole.W_dec_ND[ids_N],
            whole.b_dec_D.clone(),
            whole.theta_N[ids_N],
        )
        return Latents(*(part.to(device) for part in parts))

    @property
    def size(self) -> int:
        return self.W_dec_ND.shape[0]

    def encode(self, x_D: torch.Tensor) -> torch.Tensor:
        """Activations [..., N] by the inference rule of `MatryoshkaSAE.encode`; x is scaled and may have any leading
        dimensions.
        """
        return active(torch.nn.functional.linear(x_D - self.b_dec_D, self.W_enc_ND, self.b_enc_N), self.theta_N)
