"""Kept (row, latent) pairs and what else the operations on them take and give: `torch_ops`, `cpu_ops` and `cuda_ops`
compute the same, up to the order of sums; `choose` says which of them serves a device.

Shapes: B rows of this rank's batch, F latents, D = d, G prefix groups, N pairs (sorted by row, then latent), K dead
latents. Rows and latents of pairs are int32.

A pair's value is `<x - b_dec, encoder row> + b_enc` as `refine` computes it, in the order of sums that `refine` has: by
that number, and no other, pairs are kept or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT_BITS = 11
"""Bits of one pass of a radix select."""


@dataclass(frozen=True)
class Rounded:
    """Vectors and what a bf16 copy of them loses."""

    low_ND: Tensor | None
    """bf16 copy, None where no copy is wanted"""
    norm_N: Tensor
    """norm of each vector"""
    error_N: Tensor
    """norm of (vector - copy); 0 without a copy"""


class Candidates(NamedTuple):
    """Pairs that may be kept, from a screen."""

    row_N: Tensor
    latent_N: Tensor
    approx_N: Tensor
    """the screen's value, bias included"""
    margin_N: Tensor
    """what it can be off, at most"""


class Pairs(NamedTuple):
    """Kept pairs."""

    start_B1: Tensor
    """first pair of each row, and the number of pairs; int64"""
    row_N: Tensor
    latent_N: Tensor
    value_N: Tensor


class Margin(NamedTuple):
    """margin = row_a * norm + row_c * error + relative * |product| + rounding * |approx| + absolute, for a row and a
    latent's norm and error."""

    row_a_B: Tensor
    row_c_B: Tensor
    relative: float
    rounding: float
    absolute: float


class AdamStep(NamedTuple):
    """What one step of Adam needs beside gradient and state: W -= step_size * mean / (sqrt(square) * correction +
    eps).
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    """learning rate / (1 - beta1 ** step)"""
    correction: float
    """1 / sqrt(1 - beta2 ** step)"""


def new_rounded(rows_ND: Tensor, low: bool) -> Rounded:
    """Room for the rounding of these rows."""
    n = len(rows_ND)
    low_ND = torch.empty(rows_ND.shape, dtype=torch.bfloat16, device=rows_ND.device) if low else None
    return Rounded(low_ND, rows_ND.new_empty(n), rows_ND.new_empty(n))
