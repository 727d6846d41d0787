"""The one dense product of a training step, and how far it can be off.

A screen approximates all pre-activations of a batch, in bf16 or in the weights' own precision, and hands on the few
pairs that may be kept. `gate` recomputes those by the sampled dot product that defines a pair's value, so a screen
decides time and never the result: whatever it hands on, the pairs that matter are among them, because every
approximation comes with a margin that its error cannot exceed.

The margin of pair (i, j). Let x be the centred row, w the encoder row, x', w' what the product is made of, u the unit
roundoff of the weights' precision. Then

    |<x, w> - <x', w'>|  <=  ||x - x'|| ||w||  +  ||x'|| ||w - w'||                  (0 for a product in full precision)
    accumulation, here and in the sampled product:  2 (d + 8) u each, times ||x|| ||w||   (in any order of sums)
    storing the product in bf16:                    2^-8 |product|                    (0 in full precision)
    adding the bias, here and there:                a few u |product + bias|
    flushing of numbers below the smallest normal:  a few d times that number

All of it is inflated by 2^-10, far more than computing the margin itself can lose. Rows so large that a product might
overflow have an infinite margin.

Shapes: B rows of this rank's batch, F latents, D = d.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

from dmsae_ray.sae.ops.choose import is_fused
from dmsae_ray.sae.ops.pairs import Candidates, Margin, Rounded
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.sae import MatryoshkaSAE

CHUNK = 1 << 25
"""Most pre-activations at a time. More rows in one product waste less on packing the weights."""

SAMPLE = 64
"""Rows from which a first guess of the smallest kept value is made."""


class Screen:
    """Screens batches by one SAE's encoder. Keeps a bf16 copy of it, and its norms, up to date."""

    def __init__(self, sae: MatryoshkaSAE, ops: TorchPairs, mode: str = "bf16") -> None:
        """mode: `bf16`, or `fp32` for the weights' own precision (float64 weights are always screened in that)."""
        if mode not in ("bf16", "fp32"):
            raise ValueError(f"screen {mode!r} must be bf16 or fp32")
        self.sae = sae
        self.ops = ops
        self.low = mode == "bf16" and sae.W_dec.dtype == torch.float32
        self._latents: Rounded | None = None
        self._seen: tuple | None = None
        self._product: Tensor | None = None

    def latents(self) -> Rounded:
        """Norms, and bf16 copy, of all encoder rows as they are now."""
        if self._latents is None or self._seen != self._versions():
            self._latents = self.ops.round(self.sae.encoder_rows(), self.low)
            self._seen = self._versions()
        return self._latents

    def trained_latents(self) -> Rounded:
        """The part of `latents` that belongs to W_enc: whoever updates that updates this, then calls `updated`."""
        frozen, latents = self.sae.n_frozen, self.latents()
        low_FD = latents.low_ND
        return Rounded(None if low_FD is None else low_FD[frozen:], latents.norm_N[frozen:], latents.error_N[frozen:])

    def updated(self) -> None:
        """The encoder rows have changed, and `trained_latents` with them."""
        self._seen = self._versions()

    def _versions(self) -> tuple:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in (self.sae.W_enc, self.sae.W_enc_core))

    def margin(self, rows: Rounded) -> Margin:
        """How far the product of these rows with the encoder can be off."""
        info, d = torch.finfo(rows.norm_N.dtype), self.sae.d
        roundoff, grow = info.eps / 2, 1 + 2.0**-10
        largest = self.latents().norm_N.max()
        sums = 4 * (d + 8) * roundoff
        row_a_B = rows.error_N + sums * (rows.norm_N + rows.error_N) + 4 * d * info.tiny
        row_c_B = (rows.norm_N + rows.error_N) * (1 + sums) + 4 * d * info.tiny
        # x * w may overflow, or x have no finite norm: no approximation of that row says anything.
        safe_B = (rows.norm_N + rows.error_N) * largest < info.max / 2**10
        row_a_B = torch.where(safe_B, row_a_B * grow, torch.inf)
        row_c_B = torch.where(safe_B, row_c_B * grow, torch.inf)
        relative = (
            2.0**-8 * (1 + 2.0**-8) * grow if self.low and not self.ops.fused else 0.0
        )  # a fused product is not stored
        return Margin(row_a_B, row_c_B, relative, 8 * roundoff, 4 * d * info.tiny)

    def factors(self, centred_BD: Tensor, rows: Rounded) -> tuple[Tensor, Tensor]:
        """What the product is made of: rows [B, D] and encoder rows [F, D], in the screen's precision."""
        return (rows.low_ND, self.latents().low_ND) if self.low else (centred_BD, self.sae.encoder_rows())

    def candidates(
        self, centred_BD: Tensor, rows: Rounded, b_enc_F: Tensor, cut: float, n_exempt: int, again: bool = False
    ) -> Candidates:
        """Pairs that can reach `cut` (for the first n_exempt latents: 0), a superset of those that do.

        again: the rows are those of the last call, so a product that is still there need not be made anew.
        """
        latents, margin = self.latents(), self.margin(rows)
        left, right = self.factors(centred_BD, rows)
        if is_fused(self.ops):
            return self.ops.screened(left, right, b_enc_F, latents, margin, cut, n_exempt)
        chunk = min(len(left), max(1, CHUNK // len(right)))
        shape = (chunk, len(right))
        if self._product is None or self._product.shape != shape or self._product.device != left.device:
            self._product = torch.empty(shape, dtype=left.dtype, device=left.device)
        found = []
        for start in range(0, len(left), chunk):
            part = left[start : start + chunk]
            product_RF = self._product[: len(part)]
            if not (again and chunk == len(left)):
                torch.mm(part, right.t(), out=product_RF)
            found.append(self.ops.scan(product_RF, start, b_enc_F, latents, margin, cut, n_exempt))
        return found[0] if len(found) == 1 else Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def guess(self, centred_BD: Tensor, rows: Rounded, b_enc_F: Tensor, k: int) -> float:
        """About the k * B-th largest value of the batch, from a few of its rows; 0 if there are not so many positive
        ones.
        """
        step = max(1, len(centred_BD) // SAMPLE)
        left, right = self.factors(centred_BD, rows)
        left = left[::step]
        value = (left @ right.t()).to(b_enc_F.dtype).add_(b_enc_F).flatten()
        value = value[value > 0]
        wanted = k * len(left)
        if value.numel() <= wanted:
            return 0.0
        return value.kthvalue(value.numel() - wanted + 1).values.item()


@cache
def faster_screen(device: str, threads: int, d: int) -> str:
    """`bf16` or `fp32`, whichever product this machine does faster. Timed once per process; it cannot change a
    result.
    """
    x, W = torch.randn(256, d, device=device), torch.randn(2048, d, device=device)
    low_x, low_W = x.bfloat16(), W.bfloat16()

    def seconds(a: Tensor, b: Tensor) -> float:
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            (a @ b.t())[0, 0].item()
            best = min(best, time.perf_counter() - start)
        return best

    return "bf16" if seconds(low_x, low_W) < seconds(x, W) else "fp32"
