"""The training loss of one batch and its gradients, dense and written by hand.

Shapes: B tokens of this rank's batch, D = d, F width, P latents of a prefix group, G groups, K dead latents, N kept pairs.

    L = (1/G^2) * sum_g mean_tokens ||x - x_hat_g||^2 + alpha * L_aux

as `MatryoshkaBatchTopKTrainer.loss` of dictionary-learning 0.1.0 (means are over the global batch: every rank computes its
rows' share, and averaging gradients over ranks with equal batches gives the global one). The gradients are written out
because they are simple, and because autograd would pass over batch x width once per prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmsae_ray.sae.collective import Alone, Collective
from dmsae_ray.sae.gate import select
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings


@dataclass(frozen=True)
class Outcome:
    """What a forward pass found, beside the loss. Tensors carry no gradient; nothing here has changed any state."""

    loss_rec: Tensor
    """this rank's mean reconstruction loss, 0-dim"""
    loss_aux: Tensor
    """this rank's AuxK loss (before alpha), 0-dim"""
    residual_BD: Tensor
    """x_hat - x with all latents"""
    latent_N: Tensor
    """latent of each kept pair"""
    silent_F: Tensor
    """tokens since each latent last fired, this batch included"""
    dead_F: Tensor
    """free latents silent for the whole window"""
    smallest: float
    """smallest value kept by BatchTopK in the global batch"""


class LossModule(nn.Module):
    """The forward pass as a module, so that DistributedDataParallel can wrap it.

    Every parameter takes part in every step (with a zero gradient where nothing depends on it), so
    `find_unused_parameters` is not needed. Buffers are equal on all ranks by construction and need no broadcast.
    """

    def __init__(self, sae: MatryoshkaSAE, settings: SAESettings, comm: Collective = Alone()) -> None:
        super().__init__()
        self.sae = sae
        self.settings = settings
        self.comm = comm

    def forward(
        self, x_BD: Tensor, silent_F: Tensor, token_index_B: Tensor | None = None, lower_bound: float = 0.0
    ) -> tuple[Tensor, Outcome]:
        """This rank's loss, with gradients attached to the parameters, and the outcome.

        silent_F: tokens since each latent last fired, before this batch. token_index_B, lower_bound: see `gate.select`.
        """
        with torch.no_grad():
            loss, gradients, outcome = self._forward(x_BD, silent_F, token_index_B, lower_bound)
        sae = self.sae
        return _WithGradients.apply(loss, gradients, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), outcome

    def _forward(
        self, x_BD: Tensor, silent_F: Tensor, token_index_B: Tensor | None, lower_bound: float
    ) -> tuple[Tensor, tuple[Tensor, ...], Outcome]:
        sae, settings, comm = self.sae, self.settings, self.comm
        n_rows, n_groups, width = len(x_BD), len(sae.group_ends), sae.width
        starts = [0, *sae.group_ends[:-1]]

        centred_BD = x_BD - sae.b_dec
        encoder_FD = sae.encoder()
        p_BF = torch.addmm(sae.b_enc, centred_BD, encoder_FD.t())
        kept = select(p_BF, settings, sae.core_size, comm, token_index_B, lower_bound)
        value_N = p_BF.view(-1)[kept.index_N]
        latent_N = kept.index_N % width

        fired_F = torch.zeros(width, dtype=torch.int8, device=x_BD.device)
        fired_F[latent_N] = 1
        fired_F = comm.all_reduce_max(fired_F)
        silent_F = (silent_F + n_rows * comm.world).masked_fill_(fired_F.bool(), 0)
        dead_F = silent_F >= settings.dead_window_tokens
        dead_F[: sae.core_size] = False

        # Reconstruction: prefix g adds its group's latents to prefix g - 1.
        z_BF = torch.zeros_like(p_BF)
        z_BF.view(-1)[kept.index_N] = value_N
        error_GBD = x_BD.new_empty(n_groups, n_rows, sae.d)
        before_BD = sae.b_dec - x_BD
        for error_BD, start, end in zip(error_GBD, starts, sae.group_ends, strict=True):
            torch.addmm(before_BD, z_BF[:, start:end], sae.W_dec[start:end], out=error_BD)
            before_BD = error_BD
        loss_rec = error_GBD.square().sum() / (n_groups**2 * n_rows)
        residual_BD = error_GBD[-1].clone()

        # From here on error_GBD[g] is the gradient with respect to what group g adds: all later prefixes see it.
        error_GBD.mul_(2 / (n_groups**2 * n_rows))
        for g in range(n_groups - 2, -1, -1):
            error_GBD[g] += error_GBD[g + 1]
        grad_W_dec_FD = torch.empty_like(sae.W_dec)
        grad_z_BF = torch.empty_like(p_BF)
        for error_BD, start, end in zip(error_GBD, starts, sae.group_ends, strict=True):
            torch.mm(z_BF[:, start:end].t(), error_BD, out=grad_W_dec_FD[start:end])
            torch.mm(error_BD, sae.W_dec[start:end].t(), out=grad_z_BF[:, start:end])
        grad_p_BF = z_BF.zero_()  # z is no longer needed; its memory is
        grad_p_BF.view(-1)[kept.index_N] = grad_z_BF.view(-1)[kept.index_N]

        loss = loss_rec
        loss_aux = torch.zeros_like(loss_rec)
        dead_K = dead_F.nonzero().squeeze(1)
        if dead_K.numel() and settings.auxk_alpha:
            loss_aux, grad_dead_BK, grad_W_dec_KD = self._aux(p_BF, residual_BD, dead_K)
            loss = loss_rec + settings.auxk_alpha * loss_aux
            # Dead latents have no kept pair in this batch, so their columns are still 0.
            grad_p_BF[:, dead_K] = grad_dead_BK
            grad_W_dec_FD[dead_K] += grad_W_dec_KD

        grad_W_enc_FD = grad_p_BF[:, sae.core_size :].t() @ centred_BD
        grad_b_enc_F = grad_p_BF.sum(dim=0)
        grad_b_dec_D = error_GBD[0].sum(dim=0) - grad_b_enc_F @ encoder_FD
        outcome = Outcome(loss_rec, loss_aux, residual_BD, latent_N, silent_F, dead_F, kept.smallest)
        return loss, (grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD, grad_b_dec_D), outcome

    def _aux(self, p_BF: Tensor, residual_BD: Tensor, dead_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """AuxK loss, and alpha times its gradients with respect to the dead latents' p and decoder rows.

        Per token the largest relu(p) among the dead latents rebuild the residual, which counts as a constant.
        """
        n_rows = len(p_BF)
        n_global = n_rows * self.comm.world
        # In float64 a residual that is the same for all tokens has a variance of exactly 0.
        mean_D = self.comm.all_reduce_sum(residual_BD.sum(dim=0, dtype=torch.float64)) / n_global
        spread = (residual_BD - mean_D.to(residual_BD.dtype)).square().sum()
        variance = self.comm.all_reduce_sum(spread) / n_global
        inverse = torch.where(variance > 0, 1 / variance, 0)

        z_BK = p_BF[:, dead_K].clamp_min_(0)
        if self.settings.aux_latents < dead_K.numel():
            top = z_BK.topk(self.settings.aux_latents, dim=1, sorted=False)
            z_BK = torch.zeros_like(z_BK).scatter_(1, top.indices, top.values)
        W_dec_KD = self.sae.W_dec[dead_K]
        error_BD = torch.addmm(residual_BD, z_BK, W_dec_KD)  # residual_BD is x_hat - x, so this is the rebuilt minus the true
        loss = error_BD.square().sum() / n_rows * inverse
        error_BD *= 2 * self.settings.auxk_alpha / n_rows * inverse
        grad_BK = (error_BD @ W_dec_KD.t()).masked_fill_(z_BK <= 0, 0)
        return loss, grad_BK, z_BK.t() @ error_BD


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(grad_loss) for gradient in gradients)
