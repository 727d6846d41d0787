"""The training loss of one batch and its gradients, over kept pairs only.

Shapes: B tokens of this rank's batch, D = d, F width, G groups, N kept pairs, P trained numbers.

    L = (1/G^2) * sum_g mean_tokens ||x - x_hat_g||^2 + alpha * L_aux

as `MatryoshkaBatchTopKTrainer.loss` of dictionary-learning 0.1.0 (means are over the global batch: every rank computes its
rows' share, and averaging gradients over ranks with equal batches gives the global one). The gradients are written out: one
pass over the decoder gives all prefix errors as running sums over groups, the error of prefix g reaches group h only for
h <= g (a sum from behind), and everything else is sums over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmsae_ray.sae.aux import add_aux
from dmsae_ray.sae.collective import Alone, Collective
from dmsae_ray.sae.gate import gate
from dmsae_ray.sae.pairs import pairs_on
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.screen import Screen, faster_screen
from dmsae_ray.sae.settings import SAESettings


@dataclass(frozen=True)
class Outcome:
    """What a forward pass found, beside the loss. Tensors carry no gradient; nothing here has changed any state."""

    loss_rec: Tensor
    """this rank's mean reconstruction loss, 0-dim float64"""
    loss_aux: Tensor
    """this rank's AuxK loss (before alpha), 0-dim"""
    residual_BD: Tensor
    """x_hat - x with all latents; overwritten by the next forward pass"""
    latent_N: Tensor
    """latent of each kept pair, int32"""
    silent_F: Tensor
    """tokens since each latent last fired, this batch included"""
    dead_F: Tensor
    """free latents silent for the whole window"""
    smallest: float
    """smallest value kept by BatchTopK in the global batch"""
    bound: float
    """the gate's proven bound, from which the next batch's is guessed"""
    candidates: int
    """pairs of this rank that were screened in"""
    retries: int
    """scans of the screen beyond the first"""


class LossModule(nn.Module):
    """The forward pass as a module with one parameter: the SAE's trained numbers as one vector.

    So DistributedDataParallel can wrap it and reduces all gradients in one buffer of fixed layout; `flat` shares the memory
    of the SAE's parameters.
    """

    def __init__(self, sae: MatryoshkaSAE, settings: SAESettings, comm: Collective = Alone()) -> None:
        """Raises native.NotBuilt if compiled kernels are asked for and cannot be had."""
        super().__init__()
        device = sae.b_dec.device
        self.__dict__["sae"] = sae  # not a submodule: its parameters would be reduced twice
        self.settings = settings
        self.comm = comm
        self.ops = pairs_on(device, settings.kernels, sae.b_dec.dtype)
        screen = settings.screen
        if screen == "auto":
            screen = faster_screen(str(device), torch.get_num_threads(), sae.d)
        self.screen = Screen(sae, self.ops, screen)
        self.flat = nn.Parameter(sae.flat)
        self._S_BGD: Tensor | None = None
        self._gradient: Tensor | None = None

    def forward(
        self, x_BD: Tensor, silent_F: Tensor, token_index_B: Tensor | None = None, guess: float | None = None
    ) -> tuple[Tensor, Outcome]:
        """This rank's loss, with its gradient attached to `flat`, and the outcome. Arguments as for `compute`."""
        loss, gradient, outcome = self.compute(x_BD, silent_F, token_index_B, guess, torch.empty_like(self.flat.data))
        return _WithGradient.apply(loss, gradient, self.flat), outcome

    @torch.no_grad()
    def compute(
        self, x_BD: Tensor, silent_F: Tensor, token_index_B: Tensor | None = None, guess: float | None = None,
        gradient: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Outcome]:  # fmt: skip
        """This rank's loss, its gradient [P], and the outcome.

        silent_F: tokens since each latent last fired, before this batch. token_index_B, guess: see `gate`. gradient: where to
        put it, by default a buffer that the next call overwrites.
        """
        sae, settings, comm, ops = self.sae, self.settings, self.comm, self.ops
        n_rows, n_groups = len(x_BD), len(sae.group_ends)
        encoder_FD, W_dec_FD, b_enc_F, b_dec_D = sae.encoder_rows(), sae.W_dec.detach(), sae.b_enc.detach(), sae.b_dec.detach()
        if gradient is None:
            if self._gradient is None:
                self._gradient = torch.empty_like(sae.flat)
            gradient = self._gradient
        grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = sae.views(gradient)

        centred_BD, rows = ops.centre(x_BD, b_dec_D, self.screen.low)
        kept = gate(centred_BD, rows, self.screen, settings, comm, token_index_B, guess)
        pairs = kept.pairs
        start_F1, order_N = ops.by_latent(pairs.latent_N, sae.width)

        fired_F = comm.all_reduce_max((start_F1[1:] > start_F1[:-1]).to(torch.int8))
        silent_F = (silent_F + n_rows * comm.world).masked_fill_(fired_F.bool(), 0)
        dead_F = silent_F >= settings.dead_window_tokens
        dead_F[: sae.core_size] = False

        if self._S_BGD is None or self._S_BGD.shape[0] != n_rows:
            self._S_BGD = x_BD.new_empty(n_rows, n_groups, sae.d)
        S_BGD = self._S_BGD
        gradient_N, loss_B = ops.decode(x_BD, b_dec_D, W_dec_FD, pairs, sae.group_ends, S_BGD)
        loss_rec = loss_B.sum() / (n_groups**2 * n_rows)
        residual_BD = S_BGD[:, -1]
        scale = 2 / (n_groups**2 * n_rows)
        ops.weight_gradients(
            S_BGD, centred_BD, pairs, gradient_N, start_F1, order_N, sae.group_ends, sae.n_frozen, scale,
            grad_W_enc, grad_b_enc, grad_W_dec,
        )  # fmt: skip

        loss_aux = torch.zeros((), dtype=x_BD.dtype, device=x_BD.device)
        dead_K = dead_F.nonzero().squeeze(1)
        if dead_K.numel() and settings.auxk_alpha:
            loss_aux = add_aux(
                centred_BD, residual_BD, dead_K, encoder_FD, b_enc_F, W_dec_FD, sae.n_frozen, settings.aux_latents,
                settings.auxk_alpha, ops, comm, grad_W_enc, grad_b_enc, grad_W_dec,
            )  # fmt: skip
        # The first prefix sees every later one's error, and b_dec is in all of them; the encoder subtracts it.
        torch.sum(S_BGD[:, 0], dim=0, out=grad_b_dec).mul_(scale).sub_(ops.weighted_rows(grad_b_enc, encoder_FD))
        outcome = Outcome(
            loss_rec, loss_aux, residual_BD, pairs.latent_N, silent_F, dead_F, kept.smallest, kept.bound, kept.candidates, kept.retries
        )
        return (loss_rec + settings.auxk_alpha * loss_aux).to(x_BD.dtype), gradient, outcome


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradient: Tensor, flat: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        gradient, ctx.gradient = ctx.gradient, None
        return None, None, gradient.mul_(grad_loss)
