"""Some latents of an SAE, without the others: enough to see where they fire and what they add.

Letters: L latents, D model dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmsae_ray.sae.sae import MatryoshkaSAE, active


@dataclass(frozen=True, eq=False)
class Latents:
    """Copies of what `MatryoshkaSAE` computes these latents from; of a wide SAE, which may then go, they are a small
    part.
    """

    W_enc_LD: torch.Tensor
    b_enc_L: torch.Tensor
    W_dec_LD: torch.Tensor
    b_dec_D: torch.Tensor
    theta_L: torch.Tensor
    """what each must exceed: the SAE's threshold, or 0 for a latent of an exempt core"""

    @staticmethod
    @torch.no_grad()
    def of(sae: MatryoshkaSAE, ids: Sequence[int], device: str | torch.device = "cpu") -> Latents:
        """These latents of an SAE, in this order, on `device`."""
        ids_L = torch.as_tensor(ids, dtype=torch.int64, device=sae.W_dec.device)
        theta_L = sae.thresholds()[ids_L]
        parts = (sae.encoder_rows()[ids_L], sae.b_enc[ids_L], sae.W_dec[ids_L], sae.b_dec.clone(), theta_L)
        return Latents(*(part.detach().to(device) for part in parts))

    def __len__(self) -> int:
        return len(self.b_enc_L)

    def encode(self, x_D: torch.Tensor) -> torch.Tensor:
        """Activations [..., L] by the inference rule of `MatryoshkaSAE.encode`; x is scaled and may have any leading
        dimensions.
        """
        p_L = torch.nn.functional.linear(x_D - self.b_dec_D, self.W_enc_LD, self.b_enc_L)
        return active(p_L, self.theta_L)
