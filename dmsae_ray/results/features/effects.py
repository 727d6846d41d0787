"""What a latent does to the loss: its part is taken out of what stands at the hook, and every later token is predicted
anew.

For latent j in one sequence, at every row n on which it is active, x(n) - z_j(n) * s * d_j takes the place of x(n),
with d_j its decoder row and s the dataset's scale. The change of a token's cross-entropy is that without the latent
minus that with it, in
nats: positive where the latent helped. The rest of the stream, the SAE's error included, stays. A model in bfloat16
rounds the two runs apart: the tiny model's changes, 0.3 nats (root mean square), are then off by 0.03.
Letters: P pairs of a latent and a sequence, U different sequences among them, T context, D model dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmsae_ray.activations.outliers import counted
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.lm.divergence import token_losses
from dmsae_ray.sae.latents import Latents


@dataclass(frozen=True, eq=False)
class Removals:
    """What was read in each pair's sequence, on the CPU."""

    activation_PT: torch.Tensor
    """the latent's activation at each row, 0 elsewhere"""
    delta_PT: torch.Tensor
    """change of each token's loss when the latent is removed, in nats"""
    after_PT: torch.Tensor
    """tokens that the removal can reach: rows after the first on which the latent is active"""
    rows_PT: torch.Tensor
    """tokens that are predicted at all: neither BOS nor padding"""


@torch.no_grad()
def remove_latents(
    pieces: Sequence[Latents],
    lm,
    sequences: TokenSequences,
    scale: float,
    pairs: Sequence[tuple[int, int]],
    sequences_per_batch: int,
    remove: bool = True,
    max_norm: float | None = None,
) -> Removals:
    """pairs: (latent, counted through all pieces; sequence). The result is in their order.

    remove: without it activations alone are read, no upper block runs and every delta is 0. max_norm: the dataset's
    bound; at positions beyond it no latent is active, and nothing is removed. Pairs of one sequence are neighbours in a
    batch: it passes the lower blocks, and the upper ones as it is, once.
    """
    shape = (len(pairs), sequences.ids.shape[1])
    read = Removals(
        torch.zeros(shape),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
    )
    order = sorted(range(len(pairs)), key=lambda pair: pairs[pair][::-1])
    for first in range(0, len(order), sequences_per_batch):
        chosen = order[first : first + sequences_per_batch]
        batch = _remove(pieces, lm, sequences, scale, [pairs[pair] for pair in chosen], remove, max_norm)
        for whole_PT, part_PT in zip(vars(read).values(), vars(batch).values(), strict=True):
            whole_PT[chosen] = part_PT.cpu()
    return read


def _remove(
    pieces: Sequence[Latents],
    lm,
    sequences: TokenSequences,
    scale: float,
    pairs: list[tuple[int, int]],
    remove: bool,
    max_norm: float | None,
) -> Removals:
    device = pieces[0].b_enc_N.device
    latent_P, sequence_P = torch.tensor(pairs, device=device).T
    sequence_U, place_P = sequence_P.unique(return_inverse=True)
    seen = sequences.take(sequence_U.cpu().numpy())
    ids_UT, lengths_U = (torch.from_numpy(array).to(device, torch.int64) for array in (seen.ids, seen.lengths))
    rows_UT = lm.rows(ids_UT, lengths_U)
    cut = lm.cut(ids_UT)
    z_PT, W_dec_PD = _of_pairs(pieces, cut.value_BTD / scale, latent_P, place_P)
    rows_PT = rows_UT[place_P]
    z_PT = torch.where(counted(rows_UT, cut.value_BTD, max_norm)[place_P], z_PT, 0)
    active_PT = (z_PT > 0).int()
    after_PT = rows_PT & (active_PT.cumsum(dim=1) - active_PT > 0)
    if not remove:
        return Removals(z_PT, torch.zeros_like(z_PT), after_PT, rows_PT)
    with_UT = token_losses(lm, cut, cut.value_BTD, ids_UT, lengths_U)
    removed = cut.take(place_P)
    value_PTD = removed.value_BTD - z_PT[:, :, None] * scale * W_dec_PD[:, None, :]
    without_PT = token_losses(lm, removed, value_PTD, ids_UT[place_P], lengths_U[place_P])
    # Attention is causal: what the two runs differ by before the latent fires is rounding.
    return Removals(z_PT, torch.where(after_PT, without_PT - with_UT[place_P], 0), after_PT, rows_PT)


def _of_pairs(
    pieces: Sequence[Latents], x_UTD: torch.Tensor, latent_P: torch.Tensor, place_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's activations [P, T], at any position, and its latent's decoder row [P, D]."""
    z_PT = x_UTD.new_zeros(len(latent_P), x_UTD.shape[1])
    W_dec_PD = x_UTD.new_zeros(len(latent_P), x_UTD.shape[2])
    start = 0
    for piece in pieces:
        mine = ((latent_P >= start) & (latent_P < start + piece.size)).nonzero()[:, 0]
        if len(mine):
            local = latent_P[mine] - start
            z_PT[mine] = piece.encode(x_UTD)[place_P[mine], :, local]
            W_dec_PD[mine] = piece.W_dec_ND[local]
        start += piece.size
    return z_PT, W_dec_PD
