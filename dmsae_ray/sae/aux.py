"""AuxK: dead latents learn to rebuild what the others leave.

Shapes: B tokens of this rank's batch, D = d, K dead latents, R rows of a chunk.

Per token the largest relu(p) among the dead latents rebuild the residual, which counts as a constant; the loss is the mean
squared error over tokens divided by the residual's variance over the global batch (0 if that is 0), as in dictionary-learning
0.1.0. Up to d / 2 of the dead latents take part per token, which is most of them unless they are many, so the products over
them are dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmsae_ray.sae.collective import Collective
from dmsae_ray.sae.pairs import TorchPairs

CHUNK = 1 << 22
"""Most (row, dead latent) pairs at a time."""


def add_aux(
    centred_BD: Tensor, residual_BD: Tensor, dead_K: Tensor, encoder_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, n_frozen: int,
    most: int, alpha: float, ops: TorchPairs, comm: Collective, grad_W_enc: Tensor, grad_b_enc: Tensor, grad_W_dec: Tensor,
) -> Tensor:  # fmt: skip
    """This rank's AuxK loss (before alpha), 0-dim; alpha times its gradients are added to those of the dead latents.

    residual_BD: x_hat - x with all latents. n_frozen: latents before the first row of grad_W_enc. most: dead latents used per token.
    """
    n_rows = len(residual_BD)
    n_global = n_rows * comm.world
    # In float64 a residual that is the same for all tokens has a variance of exactly 0.
    mean_D = comm.all_reduce_sum(residual_BD.sum(dim=0, dtype=torch.float64)) / n_global
    spread = (residual_BD - mean_D.to(residual_BD.dtype)).square_().sum()
    variance = comm.all_reduce_sum(spread) / n_global
    inverse = torch.where(variance > 0, 1 / variance, 0)

    W_enc_KD, b_enc_K, W_dec_KD = encoder_FD[dead_K], b_enc_F[dead_K], W_dec_FD[dead_K]
    sum_W_enc_KD, sum_b_enc_K, sum_W_dec_KD = torch.zeros_like(W_enc_KD), torch.zeros_like(b_enc_K), torch.zeros_like(W_dec_KD)
    loss = torch.zeros((), dtype=residual_BD.dtype, device=residual_BD.device)
    chunk = max(1, CHUNK // len(dead_K))
    for centred_RD, residual_RD in zip(centred_BD.split(chunk), residual_BD.split(chunk), strict=True):
        z_RK = torch.addmm(b_enc_K, centred_RD, W_enc_KD.t())
        ops.keep_top(z_RK, most)
        error_RD = torch.addmm(residual_RD, z_RK, W_dec_KD)  # the rebuilt minus the true
        loss += error_RD.square().sum()
        error_RD *= 2 * alpha / n_rows * inverse
        sum_W_dec_KD.addmm_(z_RK.t(), error_RD)
        grad_RK = (error_RD @ W_dec_KD.t()).masked_fill_(z_RK <= 0, 0)
        sum_W_enc_KD.addmm_(grad_RK.t(), centred_RD)
        sum_b_enc_K += grad_RK.sum(dim=0)
    # Dead latents have no kept pair in this batch, but a rank may hold none of the others' rows either: add, do not set.
    grad_W_enc.index_add_(0, dead_K - n_frozen, sum_W_enc_KD)
    grad_b_enc.index_add_(0, dead_K, sum_b_enc_K)
    grad_W_dec.index_add_(0, dead_K, sum_W_dec_KD)
    return loss / n_rows * inverse
