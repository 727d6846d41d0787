"""BatchTopK: which (token, latent) pairs of a global batch are kept.

Shapes: B tokens of this rank's batch, F latents (the first C are the core), N candidates.

Over the global batch the gate keeps the first k * tokens positive pairs in the order (value descending, token ascending,
latent ascending), or all positive ones if there are fewer. The result is exact, ties included, and does not depend on how
the tokens are spread over ranks: ranks exchange their largest values and, where a tie must be cut, the places of the tied
pairs.

`core_gate: relu` keeps every positive core pair. The free latents then share k * tokens pairs (`core_budget: exempt`) or
max(tokens, k * tokens - active core pairs) (`counted`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmsae_ray.sae.collective import Alone, Collective, gather_ragged
from dmsae_ray.sae.settings import SAESettings


@dataclass(frozen=True)
class Kept:
    """The kept pairs of this rank's rows."""

    index_N: Tensor
    """places in the flattened [B, F] pre-activations, ascending, int64"""
    smallest: float
    """smallest value kept by BatchTopK in the global batch (an exempt core left out); 0 if nothing was kept"""


def gate(
    p_BF: Tensor,
    settings: SAESettings,
    core_size: int,
    comm: Collective = Alone(),
    token_index_B: Tensor | None = None,
    lower_bound: float = 0.0,
) -> tuple[Tensor, float]:
    """Kept pairs as a mask [B, F] (bool) of this rank's rows, and the smallest kept value. Arguments as for `select`."""
    kept = select(p_BF, settings, core_size, comm, token_index_B, lower_bound)
    mask_BF = torch.zeros(p_BF.shape, dtype=torch.bool, device=p_BF.device)
    mask_BF.view(-1)[kept.index_N] = True
    return mask_BF, kept.smallest


def select(
    p_BF: Tensor,
    settings: SAESettings,
    core_size: int,
    comm: Collective = Alone(),
    token_index_B: Tensor | None = None,
    lower_bound: float = 0.0,
) -> Kept:
    """The kept pairs of this rank's rows.

    p_BF: contiguous pre-activations; every rank holds the same number of rows. token_index_B: each row's place in the
    global batch (int64), by default ranks one after the other. lower_bound: a guess, equal on all ranks, that the smallest
    kept value will exceed; it saves time where it is right and never changes the result.
    """
    n_tokens = p_BF.shape[0] * comm.world
    exempt_core = settings.core_gate == "relu" and core_size > 0
    bound = max(lower_bound, 0.0)
    while True:
        index_N, is_core_N = _candidates(p_BF, bound, core_size if exempt_core else 0)
        free_N = index_N if is_core_N is None else index_N[~is_core_N]
        counts = torch.tensor([free_N.numel(), index_N.numel() - free_N.numel()], device=p_BF.device)
        n_free, n_core = comm.all_reduce_sum(counts).tolist()
        budget = settings.k * n_tokens
        if exempt_core and settings.core_budget == "counted":
            budget = max(n_tokens, budget - n_core)
        if n_free >= budget or bound == 0.0:
            break
        bound = 0.0  # the guess was too high: start again from every positive pair

    value_N = p_BF.view(-1)[free_N]
    if n_free <= budget:
        smallest = _global_min(value_N, comm) if n_free else 0.0
        return Kept(index_N, smallest)
    threshold, n_above = _kth_largest(value_N, budget, comm)
    kept_N = value_N > threshold
    tied_N = value_N == threshold
    kept_N[tied_N] = _first_tied(free_N[tied_N], budget - n_above, p_BF.shape, comm, token_index_B)
    if is_core_N is None:
        return Kept(index_N[kept_N], threshold)
    all_kept_N = is_core_N.clone()
    all_kept_N[~is_core_N] = kept_N
    return Kept(index_N[all_kept_N], threshold)


def _candidates(p_BF: Tensor, bound: float, n_exempt: int) -> tuple[Tensor, Tensor | None]:
    """Places of all pairs above the bound (above 0 in the exempt columns), and which of them are exempt."""
    above_BF = p_BF > bound
    if n_exempt and bound > 0:
        above_BF[:, :n_exempt] = p_BF[:, :n_exempt] > 0
    flat = above_BF.view(-1)
    if flat.device.type == "cpu":  # measured on 2 M pairs: 0.6 ms, against 2.8 ms for torch.nonzero
        index_N = torch.from_numpy(np.flatnonzero(flat.numpy()))
    else:
        index_N = flat.nonzero().squeeze(1)
    return index_N, (index_N % p_BF.shape[1] < n_exempt) if n_exempt else None


def _global_min(value_N: Tensor, comm: Collective) -> float:
    """Smallest value over all ranks, of which at least one holds a value."""
    least = value_N.min() if value_N.numel() else value_N.new_tensor(torch.inf)
    return -comm.all_reduce_max(-least).item()


def _kth_largest(value_N: Tensor, k: int, comm: Collective) -> tuple[float, int]:
    """The k-th largest value over all ranks (which hold more than k), and how many values exceed it."""
    if comm.world > 1 and value_N.numel() > k:
        value_N = value_N.topk(k, sorted=False).values  # no rank can contribute more than k
    values_M = torch.cat(gather_ragged(comm, value_N))
    threshold = values_M.kthvalue(values_M.numel() - k + 1).values
    return threshold.item(), int((values_M > threshold).sum())


def _first_tied(
    index_N: Tensor, n_keep: int, shape: torch.Size, comm: Collective, token_index_B: Tensor | None
) -> Tensor:
    """Which of this rank's tied pairs (given by their places) are among the first n_keep of all ranks'."""
    if comm.world == 1 and token_index_B is None:
        return torch.arange(index_N.numel(), device=index_N.device) < n_keep
    n_rows, n_latents = shape
    row_N = index_N // n_latents
    token_N = row_N + comm.rank * n_rows if token_index_B is None else token_index_B.to(row_N.device)[row_N]
    place_N = token_N * n_latents + index_N % n_latents
    places_M = torch.cat(gather_ragged(comm, place_N))
    if places_M.numel() <= n_keep:
        return torch.ones_like(index_N, dtype=torch.bool)
    return place_N <= places_M.kthvalue(n_keep).values
