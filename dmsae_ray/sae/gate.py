"""BatchTopK: which (token, latent) pairs of a global batch are kept.

Shapes: B tokens of this rank, F latents of this rank (the first C are the core), N pairs. Ranks hold either different
tokens and all latents, or all tokens and different latents.

Over the global batch the gate keeps the first k * tokens positive pairs in the order (value descending, token
ascending, latent ascending), or all positive ones if there are fewer. A pair's value is its sampled dot product
(`pairs.py`). The result is exact, ties included, and depends neither on the screen nor on how tokens or latents are
spread over ranks.

`core_gate: relu` keeps every positive core pair. The free latents then share k * tokens pairs (`core_budget: exempt`)
or max(tokens, k * tokens - active core pairs) (`counted`).

How it is known to be exact. A screen gives every pair an approximation and a margin. If at least k * tokens free pairs
have approximation - margin >= L, then so many have values >= L, so the smallest kept value T is at least L, and every
pair that could be kept has approximation + margin >= L. The largest such L, the (k * tokens)-th largest of
approximation - margin, is used; if no guess led to enough pairs, L is 0 and all pairs that can be positive are
candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmsae_ray.sae.kept import Kept, check_margins
from dmsae_ray.sae.ops.pairs import DIGIT_BITS, Pairs, Rounded
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.collective import Alone, Collective, gather_ragged
from dmsae_ray.sae.screen import Screen
from dmsae_ray.sae.settings import SAESettings

SAMPLE_GUESS = 0.85
"""The same for a guess from a few rows of the batch itself, whose values have not had their margins taken off."""

LOWER, RETRIES = 0.85, 8
"""A guess that was too high is lowered by this factor, so many times; then every pair that can be positive is a
candidate.
"""


def gate(
    centred_BD: Tensor,
    rows: Rounded,
    screen: Screen,
    settings: SAESettings,
    comm: Collective = Alone(),
    token_index_B: Tensor | None = None,
    guess: float | Tensor | None = None,
    latent_ids_F: Tensor | None = None,
) -> Kept:
    """The kept pairs of this rank's rows.

    centred_BD: x - b_dec, rows: its rounding by `screen.ops.centre`; every rank holds the same number of rows.
    token_index_B: each row's place in the global batch (int64), by default ranks one after the other. guess: what the
    bound L is expected to exceed, equal on all ranks; None: it is guessed from the batch. latent_ids_F: this rank's
    latents, ascending, where every rank holds the whole batch and the latents are spread; None: every rank holds all
    latents. Raises `ScreenError`.

    guess as a 0-dim tensor, for one worker with fused kernels: nothing waits for the device, and all numbers in `Kept`
    stay there, as 0-dim tensors (gate_on_device.py).
    """
    sae, ops = screen.sae, screen.ops
    if ops.fused and comm.world == 1:
        from dmsae_ray.sae import gate_on_device  # needs triton

        if isinstance(guess, Tensor):
            return gate_on_device.gate_on_device(centred_BD, rows, screen, settings, guess, token_index_B)
        return gate_on_device.gate_and_wait(centred_BD, rows, screen, settings, guess, token_index_B)
    n_exempt = sae.core_size if settings.core_gate == "relu" else 0
    n_tokens, holders = (len(centred_BD) * comm.world, 1) if latent_ids_F is None else (len(centred_BD), comm.world)
    budget = settings.k * n_tokens
    b_enc_F, encoder_FD = sae.b_enc.detach(), sae.encoder_rows()

    if guess is None:
        # If each of a token's holders has its share of k pairs above the least such guess, all have k together.
        local = SAMPLE_GUESS * screen.guess(centred_BD, rows, b_enc_F, -(-settings.k // holders))
        guess = -comm.all_reduce_max(torch.tensor(-local, dtype=torch.float64, device=b_enc_F.device)).item()
    retries = 0
    while True:
        # A number of the weights' own precision: every comparison with it then means the same.
        bound = torch.tensor(max(guess, 0.0) if retries < RETRIES else 0.0, dtype=b_enc_F.dtype).item()
        found = screen.candidates(centred_BD, rows, b_enc_F, bound, n_exempt, again=retries > 0)
        if bound == 0.0:
            break
        sure_N = found.approx_N - found.margin_N
        if n_exempt:
            sure_N = sure_N.masked_fill(found.latent_N < n_exempt, 0.0)
        if comm.all_reduce_sum((sure_N >= bound).sum()).item() >= budget:
            bound = max(bound, kth_largest(sure_N, budget, ops, comm))
            break
        guess *= LOWER
        retries += 1
    value_N, wrong = ops.refine(centred_BD, encoder_FD, b_enc_F, found, bound, n_exempt)
    if comm.world > 1:  # all ranks stop together
        wrong = comm.all_reduce_sum(torch.tensor(wrong, device=b_enc_F.device)).item()
    check_margins(wrong)
    kept, smallest = select(
        found.row_N,
        found.latent_N,
        value_N,
        len(centred_BD),
        n_exempt,
        settings,
        ops,
        comm,
        token_index_B,
        latent_ids_F,
    )
    return Kept(kept, smallest, bound, len(value_N), retries)


def select(
    row_N: Tensor,
    latent_N: Tensor,
    value_N: Tensor,
    n_rows: int,
    n_exempt: int,
    settings: SAESettings,
    ops: TorchPairs,
    comm: Collective,
    token_index_B: Tensor | None,
    latent_ids_F: Tensor | None = None,
) -> tuple[Pairs, float]:
    """The kept ones of these pairs (sorted by row, then latent), which hold every pair that can be kept, and the
    smallest kept value.
    """
    core_N = latent_N < n_exempt if n_exempt else None
    free_N = value_N if core_N is None else value_N.masked_fill(core_N, -1.0)
    positive_N = value_N > 0
    counts = torch.stack(
        [(free_N > 0).sum(), (positive_N & core_N).sum() if n_exempt else positive_N.new_zeros((), dtype=torch.int64)]
    )
    n_free, n_core = comm.all_reduce_sum(counts).tolist()
    n_tokens = n_rows * comm.world if latent_ids_F is None else n_rows
    budget = settings.k * n_tokens
    if settings.core_gate == "relu" and settings.core_budget == "counted":
        budget = max(n_tokens, budget - n_core)
    if n_free <= budget:
        smallest = _smallest_positive(free_N, comm) if n_free else 0.0
        return ops.keep(row_N, latent_N, value_N, 0.0, n_exempt, n_rows, None), smallest
    threshold = kth_largest(free_N, budget, ops, comm)
    above, tied = comm.all_reduce_sum(torch.stack([(free_N > threshold).sum(), (free_N == threshold).sum()])).tolist()
    dropped_N = None
    if above + tied > budget:
        tied_N = free_N == threshold
        if latent_ids_F is None:
            dropped_N = _tied_beyond(tied_N, row_N, budget - above, n_rows, comm, token_index_B)
        else:
            dropped_N = _tied_beyond_latents(tied_N, row_N, latent_ids_F[latent_N.long()], budget - above, n_rows, comm)
    return ops.keep(row_N, latent_N, value_N, threshold, n_exempt, n_rows, dropped_N), threshold


def kth_largest(value_N: Tensor, k: int, ops: TorchPairs, comm: Collective = Alone()) -> float:
    """The k-th largest over all ranks' values, of which at least k must be positive, by counting digits of their bits.

    Ranks exchange 2048 counts per digit, never values. Positive floats are ordered like their bits read as integers.
    """
    bits_dtype = torch.int32 if value_N.dtype == torch.float32 else torch.int64
    bits = torch.iinfo(bits_dtype).bits
    prefix, left = 0, k
    for shift in range((bits - 1) // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS):
        counts = comm.all_reduce_sum(ops.count_digits(value_N, shift, prefix))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= left).sum()) - 1
        left -= int(at_least[digit] - counts[digit])
        prefix = (prefix << DIGIT_BITS) | digit
    return torch.tensor([prefix], dtype=bits_dtype).view(value_N.dtype).item()


def _smallest_positive(value_N: Tensor, comm: Collective) -> float:
    """Smallest positive value over all ranks, of which at least one holds one."""
    positive_N = value_N[value_N > 0]
    least = positive_N.min() if positive_N.numel() else value_N.new_tensor(torch.inf)
    return -comm.all_reduce_max(-least).item()


def _tied_beyond(
    tied_N: Tensor, row_N: Tensor, n_keep: int, n_rows: int, comm: Collective, token_index_B: Tensor | None
) -> Tensor:
    """Which of this rank's tied pairs come after the first n_keep of all ranks', by token, then latent.

    Ranks exchange one count per token of the global batch.
    """
    device = row_N.device
    token_B = (
        torch.arange(n_rows, device=device) + comm.rank * n_rows if token_index_B is None else token_index_B.to(device)
    )
    count_B = torch.bincount(row_N[tied_N], minlength=n_rows)
    counts = torch.zeros(n_rows * comm.world, dtype=torch.int64, device=device)
    counts[token_B] = count_B
    counts = comm.all_reduce_sum(counts)
    before = counts.cumsum(0) - counts
    keep_B = (n_keep - before[token_B]).clamp(min=0)
    # The place of each tied pair among its row's: pairs are sorted by row, then latent.
    running_N = tied_N.cumsum(0)
    first_B = count_B.cumsum(0) - count_B
    place_N = running_N - 1 - first_B[row_N.long()]
    return tied_N & (place_N >= keep_B[row_N.long()])


def _tied_beyond_latents(
    tied_N: Tensor, row_N: Tensor, id_N: Tensor, n_keep: int, n_rows: int, comm: Collective
) -> Tensor:
    """The same where ranks hold latents of all tokens. id_N: each pair's latent among those of all ranks.

    Ranks exchange one count per token, then the tied latents of the one token that the cut falls in.
    """
    count_B = comm.all_reduce_sum(torch.bincount(row_N[tied_N], minlength=n_rows))
    upto_B = count_B.cumsum(0)
    cut = int((upto_B <= n_keep).sum())  # tokens before this one keep all their ties, since more than n_keep are tied
    here_N = tied_N & (row_N == cut)
    ids = torch.cat(gather_ragged(comm, id_N[here_N])).sort().values
    first_out = ids[n_keep - int(upto_B[cut] - count_B[cut])]
    return tied_N & ((row_N > cut) | ((row_N == cut) & (id_N >= first_out)))
