"""AuxK: dead latents learn to rebuild what the others leave.

Shapes: B tokens of this rank, D = d, K dead latents of this rank, G prefix groups, R rows of a chunk.

Per token the largest relu(p) among the dead latents rebuild the residual, which counts as a constant; the loss is the
mean squared error over tokens divided by the residual's variance over the global batch (0 if that is 0), as in
dictionary-learning 0.1.0. Up to d / 2 of the dead latents take part per token, which is most of them unless they are
many, so the products over them are dense.

Other ranks may hold the other rows (`rows`) or the other latents (`latents`); in the latter case ranks exchange what
decides which latents are a token's largest, and what their latents rebuild.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.collective import Alone, Collective

CHUNK = 1 << 22
"""Most (row, dead latent) pairs at a time."""


@dataclass(frozen=True)
class Dead:
    """The dead latents, of which each rank in `ranks` holds some."""

    latent_K: Tensor
    """this rank's, by their place among its latents, ascending"""
    group_K: Tensor
    """prefix group of each: latents of all ranks are ordered by group, then rank, then place"""
    n_groups: int
    count: int
    """on all ranks together"""
    most: int
    """on one rank"""
    ranks: Collective = Alone()
    exists_K: Tensor | None = None
    """which of latent_K are dead latents at all, where only the device knows how many there are; None: all"""


def find_dead(dead_F: Tensor, group_ends: list[int], ranks: Collective, at_most: int | None = None) -> Dead:
    """dead_F: which of this rank's latents are dead.

    at_most: a bound on their number; with it (one rank only) nothing waits for the device, and places that are not
    needed name the last latent, which is a free one.
    """
    if at_most is not None:
        latent_K = torch.nonzero_static(dead_F, size=at_most, fill_value=-1).squeeze(1)
        exists_K = latent_K >= 0
        latent_K = torch.where(exists_K, latent_K, len(dead_F) - 1)
        return Dead(latent_K, torch.zeros_like(latent_K), len(group_ends), at_most, at_most, ranks, exists_K)
    latent_K = dead_F.nonzero().squeeze(1)
    group_K = torch.bucketize(latent_K, torch.tensor(group_ends, device=dead_F.device), right=True)
    counts = [len(latent_K)]
    if ranks.world > 1:
        counts = torch.stack(ranks.all_gather(torch.tensor(len(latent_K), device=dead_F.device))).tolist()
    return Dead(latent_K, group_K, len(group_ends), sum(counts), max(counts), ranks)


def add_aux(
    centred_BD: Tensor,
    residual_BD: Tensor,
    dead: Dead,
    encoder_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    n_frozen: int,
    most: int,
    alpha: float,
    ops: TorchPairs,
    rows: Collective,
    grad_W_enc: Tensor,
    grad_b_enc: Tensor,
    grad_W_dec: Tensor,
) -> Tensor:
    """This rank's rows' AuxK loss (before alpha), 0-dim; alpha times its gradients are added to those of the dead
    latents.

    residual_BD: x_hat - x with all latents of all ranks. n_frozen: latents before the first row of grad_W_enc. most:
    dead latents used per token. rows: the ranks that hold the other rows.
    """
    n_rows, latents, dead_K = len(residual_BD), dead.ranks, dead.latent_K
    n_global = n_rows * rows.world
    # In float64 a residual that is the same for all tokens has a variance of exactly 0.
    mean_D = rows.all_reduce_sum(residual_BD.sum(dim=0, dtype=torch.float64)) / n_global
    spread = (residual_BD - mean_D.to(residual_BD.dtype)).square_().sum()
    variance = rows.all_reduce_sum(spread) / n_global
    inverse = torch.where(variance > 0, 1 / variance, 0)

    W_enc_KD, b_enc_K, W_dec_KD = encoder_FD[dead_K], b_enc_F[dead_K], W_dec_FD[dead_K]
    sum_W_enc_KD, sum_b_enc_K, sum_W_dec_KD = (
        torch.zeros_like(W_enc_KD),
        torch.zeros_like(b_enc_K),
        torch.zeros_like(W_dec_KD),
    )
    if dead.exists_K is not None:
        b_enc_K = torch.where(dead.exists_K, b_enc_K, -torch.inf)  # is then no token's largest, and gets no gradient
        inverse = torch.where(dead.exists_K.any(), inverse, 0)
    loss = torch.zeros((), dtype=residual_BD.dtype, device=residual_BD.device)
    chunk = max(1, CHUNK // dead.count)
    for centred_RD, residual_RD in zip(centred_BD.split(chunk), residual_BD.split(chunk), strict=True):
        z_RK = torch.addmm(b_enc_K, centred_RD, W_enc_KD.t())
        if latents.world == 1:
            ops.keep_top(z_RK, most)
            error_RD = torch.addmm(residual_RD, z_RK, W_dec_KD)  # the rebuilt minus the true
        else:
            keep_top_of_ranks(z_RK, most, dead)
            error_RD = latents.all_reduce_sum(z_RK @ W_dec_KD) + residual_RD
        loss += error_RD.square().sum()
        error_RD *= 2 * alpha / n_rows * inverse
        sum_W_dec_KD.addmm_(z_RK.t(), error_RD)
        grad_RK = (error_RD @ W_dec_KD.t()).masked_fill_(z_RK <= 0, 0)
        sum_W_enc_KD.addmm_(grad_RK.t(), centred_RD)
        sum_b_enc_K += grad_RK.sum(dim=0)
    # Dead latents have no kept pair in this batch, but a rank may hold none of the others' rows either: add, do not
    # set.
    grad_W_enc.index_add_(0, dead_K - n_frozen, sum_W_enc_KD)
    grad_b_enc.index_add_(0, dead_K, sum_b_enc_K)
    grad_W_dec.index_add_(0, dead_K, sum_W_dec_KD)
    return loss / n_rows * inverse


def keep_top_of_ranks(z_RK: Tensor, most: int, dead: Dead) -> None:
    """In place, what `keep_top` does to the columns of all ranks side by side, in the latents' order.

    Ranks exchange their largest values of every row, as many as could be kept, and how many of each group equal the
    smallest kept.
    """
    z_RK.nan_to_num_(nan=0.0, posinf=torch.inf).clamp_min_(0)
    if most >= dead.count:
        return
    n_rows, width = len(z_RK), min(most, dead.most)
    largest = z_RK.new_zeros(n_rows, width)
    mine = min(most, z_RK.shape[1])
    largest[:, :mine] = z_RK.topk(mine, dim=1).values
    largest = torch.cat(dead.ranks.all_gather(largest), dim=1)
    least_R1 = largest.topk(most, dim=1).values[:, -1:]
    # Whatever exceeds the smallest kept value is among those exchanged; what equals it may not be.
    left_R1 = most - (largest > least_R1).sum(dim=1, keepdim=True)
    tied_RK = z_RK == least_R1
    tied_RG = torch.zeros(n_rows, dead.n_groups, dtype=torch.int64, device=z_RK.device).index_add_(
        1, dead.group_K, tied_RK.long()
    )
    tied_RGW = torch.stack(dead.ranks.all_gather(tied_RG), dim=2)
    # Tied columns of all ranks before the first one of this rank's in each group, less this rank's own in the groups
    # before.
    before_RG = (tied_RGW.flatten(1).cumsum(1).view(tied_RGW.shape) - tied_RGW)[:, :, dead.ranks.rank]
    before_RG -= tied_RG.cumsum(1) - tied_RG
    place_RK = before_RG[:, dead.group_K] + tied_RK.cumsum(1)
    z_RK.masked_fill_((z_RK < least_R1) | (tied_RK & (place_RK > left_R1)), 0)
