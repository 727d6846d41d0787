"""The training step with dense products throughout, on the package's own parameters: what `bench_step.py` compares
with.

The same mathematics as `dmsae_ray.sae` for one process and an empty or batchtopk core, gradients written by hand,
torch's fused Adam: what one would write without the sparse operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmsae_ray.sae.median import geometric_median
from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows
from dmsae_ray.sae.settings import SAESettings


class DenseTrainer:
    """Trains `sae` in place, one batch a call."""

    def __init__(self, sae: MatryoshkaSAE, settings: SAESettings) -> None:
        self.sae, self.settings = sae, settings
        self.parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )
        self.silent_F = torch.zeros(sae.width, dtype=torch.int64)
        self.steps_done = 0

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> float:
        """The batch's loss."""
        sae, settings = self.sae, self.settings
        if self.steps_done == 0:
            sae.b_dec.copy_(geometric_median(x_BD))
        n_rows, n_groups, starts = len(x_BD), len(sae.group_ends), [0, *sae.group_ends[:-1]]
        centred_BD, encoder_FD = x_BD - sae.b_dec, sae.encoder_rows()
        p_BF = torch.addmm(sae.b_enc, centred_BD, encoder_FD.t()).relu_()
        top = p_BF.view(-1).topk(min(settings.k * n_rows, p_BF.numel()), sorted=False)
        z_BF = torch.zeros_like(p_BF)
        z_BF.view(-1)[top.indices] = top.values
        self.silent_F = (self.silent_F + n_rows).masked_fill_((z_BF > 0).any(dim=0), 0)
        dead_F = self.silent_F >= settings.dead_window_tokens
        dead_F[: sae.core_size] = False

        error_GBD = x_BD.new_empty(n_groups, n_rows, sae.d)
        before_BD = sae.b_dec - x_BD
        for error_BD, start, end in zip(error_GBD, starts, sae.group_ends, strict=True):
            torch.addmm(before_BD, z_BF[:, start:end], sae.W_dec[start:end], out=error_BD)
            before_BD = error_BD
        loss = error_GBD.square().sum() / (n_groups**2 * n_rows)
        residual_BD = error_GBD[-1].clone()
        error_GBD.mul_(2 / (n_groups**2 * n_rows))
        for g in range(n_groups - 2, -1, -1):
            error_GBD[g] += error_GBD[g + 1]
        grad_W_dec_FD, grad_p_BF = torch.empty_like(sae.W_dec), torch.empty_like(p_BF)
        for error_BD, start, end in zip(error_GBD, starts, sae.group_ends, strict=True):
            torch.mm(z_BF[:, start:end].t(), error_BD, out=grad_W_dec_FD[start:end])
            torch.mm(error_BD, sae.W_dec[start:end].t(), out=grad_p_BF[:, start:end])
        grad_p_BF.masked_fill_(z_BF == 0, 0)

        if dead_F.any() and settings.auxk_alpha:
            variance = (residual_BD - residual_BD.mean(dim=0)).square().sum() / n_rows
            z_aux_BF = torch.zeros_like(p_BF)
            dead = torch.where(dead_F, p_BF, 0).topk(min(settings.aux_latents, int(dead_F.sum())), dim=1, sorted=False)
            z_aux_BF.scatter_(1, dead.indices, dead.values)
            error_BD = torch.addmm(residual_BD, z_aux_BF, sae.W_dec)
            loss = loss + settings.auxk_alpha * error_BD.square().sum() / n_rows / variance
            error_BD *= 2 * settings.auxk_alpha / n_rows / variance
            grad_p_BF += (error_BD @ sae.W_dec.t()).masked_fill_(z_aux_BF == 0, 0)
            grad_W_dec_FD += z_aux_BF.t() @ error_BD

        sae.W_dec.grad = grad_W_dec_FD
        sae.W_enc.grad = grad_p_BF[:, sae.n_frozen :].t() @ centred_BD
        sae.b_enc.grad = grad_p_BF.sum(dim=0)
        sae.b_dec.grad = error_GBD[0].sum(dim=0) - sae.b_enc.grad @ encoder_FD
        row_FD = sae.W_dec / (torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True) + 1e-6)
        grad_W_dec_FD.addcmul_(row_FD, torch.linalg.vecdot(grad_W_dec_FD, row_FD)[:, None], value=-1)
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate(self.steps_done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.W_dec.copy_(unit_rows(sae.W_dec))
        self.steps_done += 1
        return loss.item()
