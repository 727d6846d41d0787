"""Activation agreement: do matched latents fire on the same tokens, equally strongly?

Rows tell which way two latents point; this tells whether they are used alike, thresholds and biases included.
Shape letters: R held-out rows, N and M latents of the two sides, D model dimension, P matched pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.compare.latents import Latents
from dmsae_ray.compare.match import Matching

ROWS = 65_536
"""Held-out rows at most: one fp32 matrix of so many rows and a core of 1000 latents takes 262 MB."""
DRAWS = 20
"""Draws of a null whose activations are compared: each encodes as many latents as a core has, on all rows."""
PART = 8192
"""Rows encoded at a time."""


@dataclass(frozen=True)
class Agreement:
    """Pearson correlation of matched latents' activations."""

    mean: float | None
    """mean over the counted pairs; None if there is none"""
    counted: int
    """matched pairs of which both latents are active on some of the rows"""
    left_out: int
    """matched pairs of which one is silent on all of them: it has no correlation"""


def standardised(latents: Latents, rows_RD: torch.Tensor) -> torch.Tensor:
    """Activations with mean 0 and norm 1 over the rows, fp32 [R, N]: a correlation is then a dot product.

    A latent that is silent on all rows is a column of zeros. rows_RD: raw units.
    """
    z_RN = torch.empty(rows_RD.shape[0], latents.size, dtype=torch.float32)
    for part_RD, part_RN in zip(rows_RD.split(PART), z_RN.split(PART), strict=True):
        part_RN.copy_(latents.activations(part_RD))
    z_RN -= z_RN.mean(dim=0, dtype=torch.float64).float()
    norm_N = torch.linalg.vector_norm(z_RN, dim=0, dtype=torch.float64).float()  # fp32 sums of a column are added one by one
    return z_RN.div_(torch.where(norm_N > 0, norm_N, 1))


def agreement(left_RN: torch.Tensor, right_RM: torch.Tensor, matching: Matching) -> Agreement:
    """Mean correlation over matched pairs. left_RN, right_RM: as `standardised` gives them."""
    left_P, right_P = torch.from_numpy(matching.left_P), torch.from_numpy(matching.right_P)
    alive_P = left_RN.any(dim=0)[left_P] & right_RM.any(dim=0)[right_P]
    counted = int(alive_P.sum())
    if not counted:
        return Agreement(None, 0, len(alive_P))
    correlation_P = (left_RN[:, left_P[alive_P]] * right_RM[:, right_P[alive_P]]).sum(dim=0, dtype=torch.float64)
    return Agreement(float(correlation_P.mean().clip(-1, 1)), counted, len(alive_P) - counted)
