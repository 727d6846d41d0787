"""The gate of one worker without waiting for the device: what `gate.gate` keeps, in lists whose length only the device
knows.

Shapes: B tokens, F latents, C places for candidates, N places for kept pairs.

Where the host would look at a count and decide, here both ways are launched and a flag on the device switches kernels
off. The first scan uses the guess. If that proves too high (fewer than k * B values surely reach it) or too low (more
candidates than places), a second product counts all values by their leading bits, which gives a cut that is surely
reached by k * B values and less than an eighth below the highest such, and a third scans with it; so one retry is
enough, whatever the guess. Only if even then the candidates exceed the places, because margins are wide or too few
values are positive, is the batch's gate `short`, and has to be made again with more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmsae_ray.sae.kept import Kept, check_margins
from dmsae_ray.sae.ops.choose import is_fused
from dmsae_ray.sae.ops.pairs import Pairs, Rounded
from dmsae_ray.sae.screen import Screen
from dmsae_ray.sae.settings import SAESettings

if TYPE_CHECKING:
    from dmsae_ray.sae.ops.cuda_ops import TritonPairs

PLACES = 4
"""Places for candidates, per pair that can be kept by BatchTopK. 1.2 to 2.1 are used on the CPU's bench
(jobs/bench/bench_step.md).
"""


def kept_places(settings: SAESettings, n_rows: int, n_exempt: int) -> int:
    """Most pairs that can be kept: an exempt core has no limit but its size."""
    return min(settings.k, settings.width - n_exempt) * n_rows + n_exempt * n_rows


def gate_and_wait(
    centred_BD: Tensor,
    rows: Rounded,
    screen: Screen,
    settings: SAESettings,
    guess: float | None,
    token_index_B: Tensor | None = None,
) -> Kept:
    """`gate_on_device` as `gate.gate` has it: with numbers of the host, lists of their true length, and repeated if it
    fell short.
    """
    ops = screen.ops
    assert is_fused(ops), "no other operations are gated here"
    guess = screen.sae.b_enc.detach().new_full((), guess or torch.inf)
    while True:
        kept = gate_on_device(centred_BD, rows, screen, settings, guess, token_index_B)
        numbers: tuple[Tensor, ...] = (  # 0-dim, see `Kept`
            kept.smallest,
            kept.bound,
            kept.candidates,
            kept.retries,
            kept.wrong,
            kept.short,
            kept.pairs.start_B1[-1],
        )
        smallest, bound, *counts, n = torch.stack([number.double() for number in numbers]).tolist()
        candidates, retries, wrong, short = map(int, counts)
        if not short:
            break
        ops.make_room(candidates)
    check_margins(wrong)
    start_B1, *lists = kept.pairs
    return Kept(Pairs(start_B1, *(part[: int(n)] for part in lists)), smallest, bound, candidates, retries)


def gate_on_device(
    centred_BD: Tensor,
    rows: Rounded,
    screen: Screen,
    settings: SAESettings,
    guess: Tensor,
    token_index_B: Tensor | None = None,
) -> Kept:
    """The kept pairs of the whole batch, and 0-dim tensors for numbers. guess: 0-dim, of the weights' type, `inf` if
    there is none.

    Candidates get `ops.places` places, and at least PLACES for each pair of the budget.
    """
    ops = screen.ops
    assert is_fused(ops), "no other operations are gated here"
    places = min(max(ops.places, PLACES * settings.k * len(centred_BD)), len(centred_BD) * settings.width)
    sae, n_rows = screen.sae, len(centred_BD)
    n_exempt = sae.core_size if settings.core_gate == "relu" else 0
    b_enc_F, encoder_FD = sae.b_enc.detach(), sae.encoder_rows()
    latents, margin = screen.latents(), screen.margin(rows)
    factors = (*screen.factors(centred_BD, rows), b_enc_F, latents, margin)
    budget = torch.full((), settings.k * n_rows, dtype=torch.int64, device=b_enc_F.device)

    def sure(found):
        sure_C = torch.where(found.row_N < n_rows, found.approx_N - found.margin_N, 0.0)
        return torch.where(found.latent_N < n_exempt, 0.0, sure_C) if n_exempt else sure_C

    cut = torch.where(guess > 0, guess, torch.inf)
    found, count = ops.append(*factors, cut, n_exempt, places)
    again = (((sure(found) >= cut).sum() < budget) | (count > places)).int()
    level = ops.sure_level(*factors, n_exempt, budget, again)
    cut = torch.where(again != 0, level, cut)
    found, count = ops.append(*factors, cut, n_exempt, places, again, (found, count))

    bound = torch.maximum(cut, ops.kth_largest(sure(found), budget))
    bound = torch.where(cut > 0, bound, 0.0)
    value_C, wrong = ops.refined(centred_BD, encoder_FD, b_enc_F, found, bound, n_exempt)
    pairs, smallest = select_on_device(
        found.row_N, found.latent_N, value_C, n_rows, n_exempt, settings, ops, token_index_B
    )
    return Kept(pairs, smallest, bound, count, again, wrong, count > places)


def select_on_device(
    row_C: Tensor,
    latent_C: Tensor,
    value_C: Tensor,
    n_rows: int,
    n_exempt: int,
    settings: SAESettings,
    ops: TritonPairs,
    token_index_B: Tensor | None,
) -> tuple[Pairs, Tensor]:
    """`gate.select` for one worker; the list may end in padding (row B, value 0 or less)."""
    core_C = latent_C < n_exempt
    free_C = torch.where(core_C, -1.0, value_C)
    positive_C = value_C > 0
    budget = torch.full((), settings.k * n_rows, dtype=torch.int64, device=value_C.device)
    if n_exempt and settings.core_budget == "counted":
        budget = (budget - (positive_C & core_C).sum()).clamp(min=n_rows)
    threshold = ops.kth_largest(free_C, budget)  # 0 if there are fewer
    smallest = torch.where(threshold > 0, threshold, torch.where(free_C > 0, free_C, torch.inf).min())
    smallest = torch.where((free_C > 0).any(), smallest, 0.0)

    # Ties at the threshold, by token, then latent: each row is told how many of its own stay.
    tied_C = (free_C == threshold) & (threshold > 0)
    left = budget - (free_C > threshold).sum()
    first_B1 = torch.searchsorted(
        row_C, torch.arange(n_rows + 1, dtype=torch.int32, device=row_C.device)
    )  # padding is behind the last
    tied_C1 = torch.cat([row_C.new_zeros(1, dtype=torch.int64), tied_C.cumsum(0)])
    tied_B1 = tied_C1[first_B1]
    tied_B = tied_B1.diff()
    order_B = slice(None) if token_index_B is None else token_index_B.to(row_C.device)
    by_token = torch.zeros_like(tied_B)
    by_token[order_B] = tied_B
    before = by_token.cumsum(0) - by_token
    stay_B = (left - before[order_B]).clamp(min=0)
    of_C = row_C.clamp(max=n_rows - 1)
    place_C = tied_C1[:-1] - tied_B1[of_C]
    dropped_C = tied_C & (place_C >= stay_B[of_C])

    kept_C = positive_C & ((value_C >= threshold) | core_C) & ~dropped_C
    places = min(kept_places(settings, n_rows, n_exempt), len(row_C))
    # Kept pairs move to the front; all others go to one place behind the last, which is cut off.
    to_C = torch.where(kept_C, kept_C.cumsum(0) - 1, places)
    ends = (
        row_C.new_full((places + 1,), n_rows),
        latent_C.new_full((places + 1,), settings.width),
        value_C.new_zeros(places + 1),
    )
    row_N, latent_N, value_N = (
        end.scatter_(0, to_C, part)[:places] for end, part in zip(ends, (row_C, latent_C, value_C), strict=True)
    )
    start_B1 = torch.searchsorted(row_N, torch.arange(n_rows + 1, dtype=torch.int32, device=row_N.device))
    return Pairs(start_B1, row_N, latent_N, value_N), smallest
