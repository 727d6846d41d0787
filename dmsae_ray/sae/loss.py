"""The training loss of one batch and its gradients, over kept pairs only.

Shapes: B tokens that this rank computes with, R of them at a time, D = d, F latents of this rank, G groups, N kept
pairs, P trained numbers.

    L = (1/G^2) * sum_g mean_tokens ||x - x_hat_g||^2 + alpha * L_aux

as `MatryoshkaBatchTopKTrainer.loss` of dictionary-learning 0.1.0 (means are over the global batch). The gradients are
written
out: one pass over the decoder gives all prefix errors as running sums over groups, the error of prefix g reaches group
h only for h <= g (a sum from behind), and everything else is sums over pairs.

Several ranks start with equal shares of the batch's rows. The gate is one over the whole batch. Then
`settings.parallel` says:

- `ddp`: every rank computes the gradient of its rows; their mean over ranks is the batch's.
- `gather`: ranks give each other rows and kept pairs, and each computes the whole gradient, in the batch's own order:
the same
  bits on every rank, and on any number of ranks. Nothing as large as a gradient is sent; the work on pairs is done by
  each.
- `latent`: ranks give each other their rows first; each gates its latents on all rows. What a rank's latents add to the
  reconstructions is summed over ranks, and the gradient of its own latents is then complete.

Prefix errors of a whole batch are its largest intermediate (G times the batch): `settings.micro_batch` rows are done at
a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmsae_ray.sae.auxk import add_aux, find_dead
from dmsae_ray.sae.gate import gate
from dmsae_ray.sae.ops.choose import pairs_on
from dmsae_ray.sae.ops.pairs import Pairs
from dmsae_ray.sae.ranks.collective import Alone, Collective
from dmsae_ray.sae.ranks.exchange import all_pairs, all_rows, order_of
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.screen import Screen, faster_screen
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.training_prefixes import Prefixes


@dataclass(frozen=True)
class Outcome:
    """What a forward pass found, beside the loss. Tensors carry no gradient; nothing here has changed any state."""

    loss_rec: Tensor
    """mean reconstruction loss of the rows computed with, 0-dim float64"""
    loss_aux: Tensor
    """their AuxK loss (before alpha), 0-dim"""
    x_BD: Tensor
    """the rows computed with: this rank's (ddp), or the whole batch"""
    residual_BD: Tensor
    """x_hat - x with all latents; overwritten by the next forward pass"""
    latent_N: Tensor
    """latent of each kept pair of these rows and this rank's latents, int32"""
    silent_F: Tensor
    """tokens since each latent last fired, this batch included"""
    dead_F: Tensor
    """free latents silent for the whole window"""
    smallest: float | Tensor
    """smallest value kept by BatchTopK in the global batch"""
    bound: float | Tensor
    """the gate's proven bound, from which the next batch's is guessed"""
    candidates: int | Tensor
    """pairs of these rows and this rank's latents that were screened in"""
    retries: int | Tensor
    """scans of the screen beyond the first"""
    wrong: int | Tensor = 0
    short: bool | Tensor = False
    """this and `wrong`: see `kept.Kept`. If the guess was a tensor all numbers are 0-dim tensors, and latent_N ends in
    padding
    """


class LossModule(nn.Module):
    """The forward pass as a module with one parameter: the SAE's trained numbers as one vector.

    So DistributedDataParallel can wrap it and reduces all gradients in one buffer of fixed layout; `flat` shares the
    memory of the SAE's parameters.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        settings: SAESettings,
        comm: Collective = Alone(),
        latent_ids_F: Tensor | None = None,
        core_size: int | None = None,
    ) -> None:
        """latent_ids_F: with parallel `latent`, and only then, the latents that this rank's SAE has of the whole one,
        ascending. core_size: of the whole one; None: that of `sae`.

        Raises native.NotBuilt if compiled kernels are asked for and cannot be had.
        """
        super().__init__()
        device = sae.b_dec.device
        self.__dict__["sae"] = sae  # not a submodule: its parameters would be reduced twice
        self.settings = settings
        self.comm = comm
        # One rank alone does the same in every mode.
        self.parallel = settings.parallel if comm.world > 1 else "ddp"
        assert (latent_ids_F is not None) == (self.parallel == "latent")
        self.latent_ids_F = latent_ids_F
        self.rows: Collective = comm if self.parallel == "ddp" else Alone()
        """the ranks that compute with the other rows"""
        self.latents: Collective = comm if self.parallel == "latent" else Alone()
        """the ranks that hold the other latents"""
        self.ops = pairs_on(device, settings.kernels, sae.b_dec.dtype)
        screen = settings.screen
        if screen == "auto":
            screen = faster_screen(str(device), torch.get_num_threads(), sae.d)
        self.screen = Screen(sae, self.ops, screen)
        self.prefixes = Prefixes(
            settings, sae.core_size if core_size is None else core_size, sae.group_ends, latent_ids_F
        )
        self.flat = nn.Parameter(sae.flat)
        self._S_RGD: Tensor | None = None
        self._gradient: Tensor | None = None

    def forward(
        self,
        x_BD: Tensor,
        silent_F: Tensor,
        token_index_B: Tensor | None = None,
        guess: float | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Outcome]:
        """This rank's loss, with its gradient attached to `flat`, and the outcome. Arguments as for `compute`."""
        gradient = torch.empty_like(self.flat.data)
        loss, gradient, outcome = self.compute(x_BD, silent_F, token_index_B, guess, gradient, step=step)
        return _WithGradient.apply(loss, gradient, self.flat), outcome

    @torch.no_grad()
    def compute(
        self,
        x_BD: Tensor,
        silent_F: Tensor,
        token_index_B: Tensor | None = None,
        guess: float | Tensor | None = None,
        gradient: Tensor | None = None,
        dead_at_most: int | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor, Outcome]:
        """The loss of the rows that this rank computes with, its gradient [P], and the outcome.

        x_BD: this rank's rows. silent_F: tokens since each latent last fired, before this batch. token_index_B, guess:
        see `gate`.
        gradient: where to put it, by default a buffer that the next call overwrites. dead_at_most: see `find_dead`.
        step: number of the training step, which decides the sampled prefixes.
        """
        sae, settings, comm, ops = self.sae, self.settings, self.comm, self.ops
        b_enc_F, b_dec_D = sae.b_enc.detach(), sae.b_dec.detach()
        order_T = None if self.parallel == "ddp" else order_of(comm, token_index_B, x_BD.device)
        if self.parallel == "latent":
            x_BD, token_index_B = all_rows(comm, x_BD, order_T), None
        centred_BD, rows = ops.centre(x_BD, b_dec_D, self.screen.low)
        kept = gate(centred_BD, rows, self.screen, settings, comm, token_index_B, guess, self.latent_ids_F)
        pairs, candidates = kept.pairs, kept.candidates
        if self.parallel == "gather":
            x_BD = all_rows(comm, x_BD, order_T)
            pairs, candidates = all_pairs(comm, pairs, candidates, order_T)
            centred_BD = x_BD - b_dec_D

        if gradient is None:
            if self._gradient is None:
                self._gradient = torch.empty_like(sae.flat)
            gradient = self._gradient
        grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = sae.views(gradient)
        loss_rec, residual_BD, fired_F = self._reconstruction(
            x_BD, centred_BD, pairs, self.prefixes.ends(step), grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec
        )

        fired_F = self.rows.all_reduce_max(fired_F.to(torch.int8))
        silent_F = (silent_F + settings.batch).masked_fill_(fired_F.bool(), 0)
        dead_F = silent_F >= settings.dead_window_tokens
        dead_F[: sae.core_size] = False
        loss_aux = torch.zeros((), dtype=x_BD.dtype, device=x_BD.device)
        dead = find_dead(dead_F, sae.group_ends, self.latents, dead_at_most)
        if dead.count and settings.auxk_alpha:
            loss_aux = add_aux(
                centred_BD,
                residual_BD,
                dead,
                sae.encoder_rows(),
                b_enc_F,
                sae.W_dec.detach(),
                sae.n_frozen,
                settings.aux_latents,
                settings.auxk_alpha,
                ops,
                self.rows,
                grad_W_enc,
                grad_b_enc,
                grad_W_dec,
            )
        # b_dec is in every prefix's reconstruction; the encoder subtracts it.
        grad_b_dec -= self.latents.all_reduce_sum(ops.weighted_rows(grad_b_enc, sae.encoder_rows()))
        outcome = Outcome(
            loss_rec,
            loss_aux,
            x_BD,
            residual_BD,
            pairs.latent_N,
            silent_F,
            dead_F,
            kept.smallest,
            kept.bound,
            candidates,
            kept.retries,
            kept.wrong,
            kept.short,
        )
        return (loss_rec + settings.auxk_alpha * loss_aux).to(x_BD.dtype), gradient, outcome

    def _reconstruction(
        self,
        x_BD: Tensor,
        centred_BD: Tensor,
        pairs: Pairs,
        group_ends: list[int],
        grad_W_enc: Tensor,
        grad_b_enc: Tensor,
        grad_W_dec: Tensor,
        grad_b_dec: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction loss, the residual [B, D] and which latents fired [F]; fills the gradients, but for what
        reaches b_dec through the encoder."""
        sae, ops = self.sae, self.ops
        n_rows, n_groups = len(x_BD), len(group_ends)
        scale = 2 / (n_groups**2 * n_rows)
        piece = min(self.settings.micro_batch or n_rows, n_rows)
        starts = range(0, n_rows, piece)
        # One piece leaves its residual where its errors are; several, in a buffer of the whole batch.
        residual_BD = None if len(starts) == 1 else torch.empty_like(x_BD)
        fired_F = torch.zeros(sae.width, dtype=torch.bool, device=x_BD.device)
        loss_rec = torch.zeros((), dtype=torch.float64, device=x_BD.device)
        pair_starts = None if len(starts) == 1 else pairs.start_B1[[*starts, n_rows]].tolist()
        for index, start in enumerate(starts):
            x_RD, centred_RD, some = x_BD[start : start + piece], centred_BD[start : start + piece], pairs
            if pair_starts is not None:
                some = _rows_of(pairs, start, start + len(x_RD), pair_starts[index], pair_starts[index + 1])
            S_RGD, gradient_N, loss_R = self._decode(x_RD, some, group_ends, piece)
            start_F1, order_N = ops.by_latent(some.latent_N, sae.width)
            ops.weight_gradients(
                S_RGD,
                centred_RD,
                some,
                gradient_N,
                start_F1,
                order_N,
                group_ends,
                sae.n_frozen,
                scale,
                grad_W_enc,
                grad_b_enc,
                grad_W_dec,
                add=index > 0,
            )
            # The first prefix sees every later one's error.
            if index == 0:
                torch.sum(S_RGD[:, 0], dim=0, out=grad_b_dec).mul_(scale)
            else:
                grad_b_dec.add_(S_RGD[:, 0].sum(dim=0), alpha=scale)
            fired_F |= start_F1[1:] > start_F1[:-1]
            loss_rec += loss_R.sum()
            if residual_BD is None:
                residual_BD = S_RGD[:, -1]
            else:
                residual_BD[start : start + piece] = S_RGD[:, -1]
        return loss_rec / (n_groups**2 * n_rows), residual_BD, fired_F

    def _decode(
        self, x_RD: Tensor, pairs: Pairs, group_ends: list[int], most_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """S [R, G, D] from all ranks' latents, gradients of the pairs' activations [N], squared errors [R]; see
        `TorchPairs.decode`.
        """
        ops, d = self.ops, self.sae.d
        W_dec_FD, b_dec_D = self.sae.W_dec.detach(), self.sae.b_dec.detach()
        if self.latents.world > 1:
            S_RGD = self.latents.all_reduce_sum(ops.group_sums(W_dec_FD, pairs, group_ends))
            S_RGD.cumsum_(dim=1)
            loss_R = ops.errors(x_RD, b_dec_D, S_RGD)
            return S_RGD, ops.along_errors(S_RGD, W_dec_FD, pairs, group_ends), loss_R
        if self._S_RGD is None or len(self._S_RGD) != most_rows:
            self._S_RGD = x_RD.new_empty(most_rows, len(group_ends), d)
        S_RGD = self._S_RGD[: len(x_RD)]
        gradient_N, loss_R = ops.decode(x_RD, b_dec_D, W_dec_FD, pairs, group_ends, S_RGD)
        return S_RGD, gradient_N, loss_R


def _rows_of(pairs: Pairs, start: int, stop: int, first: int, last: int) -> Pairs:
    """The pairs, from `first` to before `last`, of rows `start` to before `stop`, counted from there."""
    return Pairs(
        pairs.start_B1[start : stop + 1] - first,
        pairs.row_N[first:last] - start,
        pairs.latent_N[first:last],
        pairs.value_N[first:last],
    )


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
