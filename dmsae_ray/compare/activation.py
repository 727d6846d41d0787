"""Activation agreement: do matched latents fire on the same tokens, equally strongly?

Rows tell which way two latents point; this tells whether they are used alike, thresholds and biases included.
Shape letters: R held-out rows, N and M latents of the two sides, D model dimension, P matched pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.compare.match import Matching
from dmsae_ray.compare.measured_latents import MeasuredLatents

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


@dataclass(frozen=True, eq=False)
class Standardised:
    """Activations with mean 0 and norm 1 over the rows: a correlation is then a dot product."""

    z_NR: torch.Tensor
    """fp32, a latent's activations side by side; zeros where it is silent"""
    alive_N: torch.Tensor
    """whether it is active on some of the rows, bool"""
    fires_NR: torch.Tensor
    """on which rows it is active, bool"""

    def take(self, index_C: torch.Tensor | slice) -> Standardised:
        """Those of the latents at these indices."""
        return Standardised(self.z_NR[index_C], self.alive_N[index_C], self.fires_NR[index_C])


def standardised(latents: MeasuredLatents, rows_RD: torch.Tensor) -> Standardised:
    """rows_RD: raw units."""
    z_NR = torch.empty(latents.size, rows_RD.shape[0], dtype=torch.float32)
    for part_RD, part_NR in zip(rows_RD.split(PART), z_NR.split(PART, dim=1), strict=True):
        part_NR.copy_(latents.activations(part_RD).T)
    return standardised_values(z_NR)


def standardised_values(z_NR: torch.Tensor) -> Standardised:
    """z_NR: fp32, 0 where a latent is silent; changed in place."""
    fires_NR = z_NR != 0
    z_NR -= z_NR.mean(dim=1, keepdim=True)
    z_NR /= z_NR.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return Standardised(z_NR, fires_NR.any(dim=1), fires_NR)


def agreement(left: Standardised, right: Standardised, matching: Matching) -> Agreement:
    """Mean correlation over matched pairs."""
    left_P, right_P = torch.from_numpy(matching.left_P), torch.from_numpy(matching.right_P)
    alive_P = left.alive_N[left_P] & right.alive_N[right_P]
    counted = int(alive_P.sum())
    if not counted:
        return Agreement(None, 0, len(alive_P))
    correlation_P = (left.z_NR[left_P[alive_P]] * right.z_NR[right_P[alive_P]]).sum(dim=1)
    return Agreement(float(correlation_P.double().mean().clip(-1, 1)), counted, len(alive_P) - counted)
