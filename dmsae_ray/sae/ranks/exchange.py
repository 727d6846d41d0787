"""What ranks that hold different rows of a batch give each other: rows, and kept pairs. Every rank then has the batch's
own order.

Shapes: B tokens of this rank, T = B * ranks tokens of the global batch, D = d, N pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmsae_ray.sae.ops.pairs import Pairs
from dmsae_ray.sae.ranks.collective import Collective


def order_of(comm: Collective, token_index_B: Tensor | None, device: torch.device) -> Tensor | None:
    """Where, among all ranks' rows one after the other, the batch's first, second, ... token is [T]; None: they are in
    order.
    """
    if token_index_B is None:
        return None
    return torch.cat(comm.all_gather(token_index_B.to(device))).argsort()


def all_rows(comm: Collective, x_BD: Tensor, order_T: Tensor | None) -> Tensor:
    """The global batch [T, D]."""
    x_TD = torch.cat(comm.all_gather(x_BD))
    return x_TD if order_T is None else x_TD[order_T]


def all_pairs(comm: Collective, pairs: Pairs, candidates: int, order_T: Tensor | None) -> tuple[Pairs, int]:
    """The kept pairs of the global batch, sorted by token, then latent, and the sum of the ranks' numbers of
    candidates.

    Sends latents and values, padded to the most pairs of a rank, and the number of pairs of every row.
    """
    device, n_rows = pairs.latent_N.device, len(pairs.start_B1) - 1
    sizes = torch.stack(comm.all_gather(torch.tensor([len(pairs.latent_N), candidates], device=device))).tolist()
    longest = max(size for size, _ in sizes)
    count_T = torch.cat(comm.all_gather(pairs.start_B1.diff()))
    latent_N, value_N = (
        torch.cat([part[:size] for part, (size, _) in zip(comm.all_gather(_padded(mine, longest)), sizes, strict=True)])
        for mine in (pairs.latent_N, pairs.value_N)
    )
    start_T = count_T.cumsum(0) - count_T
    if order_T is not None:
        count_T, start_T = count_T[order_T], start_T[order_T]
        ends_T = count_T.cumsum(0)
        # The n-th pair of a row is n places after the row's first, here and there.
        shift_N = (start_T - (ends_T - count_T)).repeat_interleave(count_T)
        from_N = torch.arange(len(latent_N), device=device) + shift_N
        latent_N, value_N = latent_N[from_N], value_N[from_N]
    start_T1 = torch.nn.functional.pad(count_T.cumsum(0), (1, 0))
    row_N = torch.arange(n_rows * comm.world, dtype=torch.int32, device=device).repeat_interleave(count_T)
    return Pairs(start_T1, row_N, latent_N, value_N), sum(candidates for _, candidates in sizes)


def _padded(values_N: Tensor, length: int) -> Tensor:
    padded = values_N.new_zeros(length)
    padded[: len(values_N)] = values_N
    return padded
