"""What the candidates of a chain are ranked by: attribution, or, in a placebo chain, by something
else.

Candidates are latents 0..P-1 of an SAE (its core and first free group). Every criterion is a number per candidate of
which a larger one is selected sooner; ties go to the smaller id (`select.top`).
Letters: R rows, D model dimension, F width, P candidates.
"""

from __future__ import annotations

import numpy as np
import torch

from dmsae_ray.sae.sae import MatryoshkaSAE


@torch.no_grad()
def criterion(
    by: str,
    sae: MatryoshkaSAE,
    scores_P: torch.Tensor,
    density_F: torch.Tensor,
    removal_P: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    """What each candidate is ranked by, fp64 [P] on CPU.

    attribution: its score. frequency: the share of evaluation tokens on which it is active. reconstruction: what its
    removal costs, removal_P, see `removal_cost`. norm: the norm of its encoder row; its decoder row has norm 1 in every
    SAE, while encoder rows start at norm 1 (a frozen one as it came) and grow as training sharpens a latent. random: a
    uniform draw from `seed`, whatever the latent is.
    """
    candidates = len(scores_P)
    if by == "attribution":
        return scores_P.double().cpu()
    if by == "frequency":
        return density_F[:candidates].double().cpu()
    if by == "reconstruction":
        assert removal_P is not None and len(removal_P) == candidates, (
            "what removal costs was not measured for these candidates"
        )
        return removal_P.double().cpu()
    if by == "norm":
        return torch.linalg.vector_norm(sae.encoder_rows()[:candidates].double(), dim=1).cpu()
    assert by == "random", by
    return torch.from_numpy(np.random.default_rng(seed).random(candidates))


@torch.no_grad()
def removal_cost(sae: MatryoshkaSAE, x_RD: torch.Tensor, z_RF: torch.Tensor) -> torch.Tensor:
    """How much the squared error of the smallest prefix's reconstruction grows without a candidate, fp64 [P] on CPU:

        sum over rows of  ||e + z_j d_j||^2 - ||e||^2  =  sum over rows of  2 z_j <e, d_j> + z_j^2 ||d_j||^2

    with e = x - x_hat_0 the residual of core + group 0 and d_j the decoder row. Negative for a latent that does harm, 0
    for a silent one. Each is removed alone: two latents that stand in for each other both cost little.
    """
    W_dec_PD = sae.W_dec[: sae.group_ends[0]]
    z_RP = z_RF[:, : len(W_dec_PD)]
    error_RD = x_RD - sae.decode(z_RP)
    cost_RP = z_RP * (2 * (error_RD @ W_dec_PD.T) + z_RP * W_dec_PD.square().sum(dim=1))
    return cost_RP.double().sum(dim=0).cpu()
