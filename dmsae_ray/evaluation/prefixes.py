"""Which part of an SAE is measured: its core alone, then group after group, to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dmsae_ray.sae.sae import MatryoshkaSAE

CORE = "core"
"""Name of the prefix that is the core alone."""


@dataclass(frozen=True)
class Prefix:
    """The first latents of an SAE."""

    name: str
    """`core`, or the number g of the last group in it: core + groups 0..g"""
    latents: int


def prefixes_of(sae: MatryoshkaSAE) -> list[Prefix]:
    """The core alone, if there is one, then core + groups 0..g for every g; the last one is the whole SAE."""
    core = [Prefix(CORE, sae.core_size)] if sae.core_size else []
    return core + [Prefix(str(g), end) for g, end in enumerate(sae.group_ends)]


def reconstructions(sae: MatryoshkaSAE, z_RF: torch.Tensor) -> Iterator[torch.Tensor]:
    """x_hat [R, D] of each prefix, `b_dec` plus its latents: each is the one before plus the latents between, a whole
    decode in all.

    A latent's activation by the inference rule does not depend on the others, so that in every prefix it is the same.
    """
    x_hat_RD, start = sae.b_dec.detach().expand(len(z_RF), -1), 0
    for prefix in prefixes_of(sae):
        x_hat_RD = x_hat_RD + z_RF[:, start : prefix.latents] @ sae.W_dec[start : prefix.latents].detach()
        start = prefix.latents
        yield x_hat_RD
