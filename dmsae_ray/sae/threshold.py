"""The inference threshold: one scalar that gives an SAE the L0 it was trained with.

Shapes: B tokens of a chunk, D = d, F = width. (Method: "theta is set on rows held back from training to the value at
which mean total L0 is k".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE, chunks: Callable[[], Iterable[Tensor]], k: int, settings: SAESettings) -> float:
    """Exact theta: over all rows of all chunks, as many pairs p > theta as the gate would have kept.

    chunks: called once per pass (two passes in float32), gives the same x_BD [B, D] each time. The target is k * rows
    pairs;
    with an exempt core (`core_gate: relu`) core pairs are those above 0, and the free pairs' target is max(rows, k *
    rows - core pairs) if the core is counted, k * rows if it is not. theta is the largest pre-activation that must not
    count, so it is a number of the SAE's own precision and `p > theta` is exact; where the target cuts a tie, the whole
    tie is left out; with fewer positive pairs than the target theta is 0. Memory is bounded: a radix select over the
    floats' ordered bits, 16 bits a pass. Does not set `sae.theta`. Raises ValueError if there are no rows.
    """
    n_exempt = sae.core_size if settings.core_gate == "relu" else 0
    bits_dtype = torch.int32 if sae.W_dec.dtype == torch.float32 else torch.int64
    bits = torch.iinfo(bits_dtype).bits
    prefix, rank = None, 0  # leading digits of the value looked for; its rank (0: largest) among those that share them
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(_DIGITS, dtype=torch.int64)
        n_rows = n_core = 0
        for x_BD in chunks():
            p_BF = sae.pre(x_BD)
            n_rows += len(p_BF)
            free = p_BF[:, n_exempt:]
            # Positive floats are ordered like their bits read as integers.
            bits_N = free[free > 0].view(bits_dtype)
            if prefix is None:
                n_core += int((p_BF[:, :n_exempt] > 0).sum())
            else:
                bits_N = bits_N[bits_N >> (shift + _DIGIT_BITS) == prefix]
            digit_N = (bits_N >> shift) & (_DIGITS - 1)
            counts += torch.bincount(digit_N, minlength=_DIGITS).cpu()
        if prefix is None:
            if n_rows == 0:
                raise ValueError("threshold calibration was given no rows")
            prefix, rank = 0, _target(k, n_rows, n_core, n_exempt > 0, settings)
            if rank >= counts.sum():
                return 0.0  # all positive pairs count
        n_at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((n_at_least > rank).nonzero()[-1])
        assert n_at_least[0] > rank, "the chunks differ from pass to pass"
        rank -= int(n_at_least[digit] - counts[digit])
        prefix = (prefix << _DIGIT_BITS) | digit
    return torch.tensor([prefix], dtype=bits_dtype).view(sae.W_dec.dtype).item()


def _target(k: int, n_rows: int, n_core: int, exempt_core: bool, settings: SAESettings) -> int:
    """Pairs that theta must let through."""
    if exempt_core and settings.core_budget == "counted":
        return max(n_rows, k * n_rows - n_core)
    return k * n_rows
