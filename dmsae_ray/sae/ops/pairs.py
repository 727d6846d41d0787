"""Sparse operations on kept (row, latent) pairs, each in several forms: `TorchPairs` in plain torch, for any device, `NativePairs`
by the compiled kernels, for CPUs, and `cuda_ops.TritonPairs` for CUDA devices. All compute the same, up to the order of sums.

Shapes: B rows of this rank's batch, F latents, D = d, G prefix groups, N pairs (sorted by row, then latent), K dead latents.
Rows and latents of pairs are int32.

A pair's value is `<x - b_dec, encoder row> + b_enc` as `refine` computes it, in the order of sums that `refine` has: by that
number, and no other, pairs are kept or not.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_ray.sae.ops import native

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
    """margin = row_a * norm + row_c * error + relative * |product| + rounding * |approx| + absolute, for a row and a latent's
    norm and error."""

    row_a_B: Tensor
    row_c_B: Tensor
    relative: float
    rounding: float
    absolute: float


class TorchPairs:
    """Plain torch: the reference of the compiled kernels, and what runs where there are none."""

    name = "torch"
    fused = False
    """whether `screened` does product and scan in one"""

    def round(self, rows_ND: Tensor, low: bool, chunk: int = 4096) -> Rounded:
        """bf16 copy of the rows (if `low`), norms, and norms of the difference."""
        norm_N = torch.linalg.vector_norm(rows_ND, dim=1, dtype=torch.float64).to(rows_ND.dtype)
        if not low:
            return Rounded(None, norm_N, torch.zeros_like(norm_N))
        low_ND = rows_ND.bfloat16()
        error_N = torch.cat([
            torch.linalg.vector_norm(part_ND - part_low_ND.to(part_ND.dtype), dim=1, dtype=torch.float64)
            for part_ND, part_low_ND in zip(rows_ND.split(chunk), low_ND.split(chunk), strict=True)
        ])  # fmt: skip
        return Rounded(low_ND, norm_N, error_N.to(rows_ND.dtype))

    def centre(self, x_BD: Tensor, b_dec_D: Tensor, low: bool) -> tuple[Tensor, Rounded]:
        """x - b_dec, and `round` of it."""
        centred_BD = x_BD - b_dec_D
        return centred_BD, self.round(centred_BD, low)

    def scan(
        self, screen_BF: Tensor, first_row: int, b_enc_F: Tensor, latents: Rounded, margin: Margin, cut: float, n_exempt: int
    ) -> Candidates:
        """Pairs whose value can reach `cut` (for the first n_exempt latents: 0), as far as their margins tell.

        screen_BF: approximate products of rows first_row, ...; NaN counts as a candidate.
        """
        rows = max(1, (1 << 22) // screen_BF.shape[1])
        cut_F = torch.full_like(b_enc_F, cut)
        cut_F[:n_exempt] = 0
        found = []
        for start in range(0, len(screen_BF), rows):
            screen_RF = screen_BF[start : start + rows].to(b_enc_F.dtype)
            at_BF = screen_RF + b_enc_F
            here = slice(first_row + start, first_row + start + len(at_BF))
            reach_BF = torch.outer(margin.row_a_B[here], latents.norm_N)
            reach_BF += torch.outer(margin.row_c_B[here], latents.error_N)
            reach_BF += margin.relative * screen_RF.abs() + margin.rounding * at_BF.abs() + margin.absolute
            row_N, latent_N = (~(at_BF + reach_BF < cut_F)).nonzero(as_tuple=True)
            found.append((
                (row_N + here.start).int(), latent_N.int(), at_BF[row_N, latent_N], reach_BF[row_N, latent_N],
            ))  # fmt: skip
        return Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def refine(
        self, centred_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, candidates: Candidates, cut: float, n_exempt: int
    ) -> tuple[Tensor, int]:
        """Values of candidates that can still reach `cut`, -1 for the others; and how many are beyond their margin."""
        row_N, latent_N, approx_N, margin_N = candidates
        cut_N = torch.full_like(approx_N, cut).masked_fill_(latent_N < n_exempt, 0)
        out_N = approx_N + margin_N < cut_N
        value_N = self.values(centred_BD, W_enc_FD, b_enc_F, row_N, latent_N)
        wrong = int((((value_N - approx_N).abs() > margin_N) & ~out_N).sum())
        return value_N.masked_fill_(out_N, -1), wrong

    def values(self, centred_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, row_N: Tensor, latent_N: Tensor) -> Tensor:
        """Values of the given pairs."""
        return _sampled(centred_BD, W_enc_FD, row_N, latent_N) + b_enc_F[latent_N]

    def count_digits(self, value_N: Tensor, shift: int, prefix: int) -> Tensor:
        """One pass of a radix select: how many positive values whose bits above the digit equal `prefix` have which digit."""
        bits_N = value_N[value_N > 0].view(torch.int32 if value_N.dtype == torch.float32 else torch.int64).long()
        if shift + DIGIT_BITS < 8 * value_N.element_size():
            bits_N = bits_N[bits_N >> (shift + DIGIT_BITS) == prefix]
        return torch.bincount((bits_N >> shift) & ((1 << DIGIT_BITS) - 1), minlength=1 << DIGIT_BITS)

    def keep(
        self, row_N: Tensor, latent_N: Tensor, value_N: Tensor, threshold: float, n_exempt: int, rows: int, dropped_N: Tensor | None
    ) -> Pairs:
        """Positive pairs at or above the threshold (the first n_exempt latents: all positive ones), but for dropped_N."""
        kept_N = (value_N > 0) & ((value_N >= threshold) | (latent_N < n_exempt))
        if dropped_N is not None:
            kept_N &= ~dropped_N
        row_N = row_N[kept_N]
        start_B1 = torch.searchsorted(row_N, torch.arange(rows + 1, device=row_N.device, dtype=torch.int32))
        return Pairs(start_B1, row_N, latent_N[kept_N], value_N[kept_N])

    def by_latent(self, latent_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """First pair of each latent [F + 1] in the pairs' order by latent, and that order (stable)."""
        order_N = torch.argsort(latent_N, stable=True)
        ends = torch.arange(width + 1, device=latent_N.device, dtype=torch.int32)
        return torch.searchsorted(latent_N[order_N], ends), order_N.int()

    def decode(
        self, x_BD: Tensor, b_dec_D: Tensor, W_dec_FD: Tensor, pairs: Pairs, group_ends: list[int], S_BGD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients <S[row, group], decoder row> of the pairs' activations [N], and each row's squared error over all prefixes [B].

        S_BGD is filled: S[b, g] = sum over h >= g of x_hat_h - x, so S[:, -1] is the residual of the whole SAE.
        """
        torch.cumsum(self.group_sums(W_dec_FD, pairs, group_ends), dim=1, out=S_BGD)
        loss_B = self.errors(x_BD, b_dec_D, S_BGD)
        return self.along_errors(S_BGD, W_dec_FD, pairs, group_ends), loss_B

    def group_sums(self, W_dec_FD: Tensor, pairs: Pairs, group_ends: list[int]) -> Tensor:
        """What the pairs of every row and group add up to, [B, G, D]: the first step of `decode`, where latents are spread over ranks."""
        n_rows, n_groups = len(pairs.start_B1) - 1, len(group_ends)
        bag_N = pairs.row_N.long() * n_groups + self._group(pairs.latent_N, group_ends)
        first = torch.searchsorted(bag_N, torch.arange(n_rows * n_groups, device=bag_N.device))
        sums = F.embedding_bag(pairs.latent_N.long(), W_dec_FD, first, mode="sum", per_sample_weights=pairs.value_N)
        return sums.view(n_rows, n_groups, -1)

    def errors(self, x_BD: Tensor, b_dec_D: Tensor, sums_BGD: Tensor) -> Tensor:
        """The second step: turns, in place, running sums over groups into S; returns each row's squared error over all prefixes [B]."""
        sums_BGD += (b_dec_D - x_BD)[:, None]
        n_groups = sums_BGD.shape[1]
        loss_B = torch.stack([sums_BGD[:, g].double().square().sum(dim=1) for g in range(n_groups)]).sum(dim=0)
        for g in range(n_groups - 2, -1, -1):
            sums_BGD[:, g] += sums_BGD[:, g + 1]
        return loss_B

    def along_errors(self, S_BGD: Tensor, W_dec_FD: Tensor, pairs: Pairs, group_ends: list[int]) -> Tensor:
        """The third step: gradients <S[row, group], decoder row> of the pairs' activations [N]."""
        bag_N = pairs.row_N * S_BGD.shape[1] + self._group(pairs.latent_N, group_ends).int()
        return self.values(S_BGD.view(-1, S_BGD.shape[2]), W_dec_FD, W_dec_FD.new_zeros(len(W_dec_FD)), bag_N, pairs.latent_N)

    def weight_gradients(
        self, S_BGD: Tensor, centred_BD: Tensor, pairs: Pairs, gradient_N: Tensor, start_F1: Tensor, order_N: Tensor,
        group_ends: list[int], n_frozen: int, scale: float, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, add: bool = False,
    ) -> None:  # fmt: skip
        """Fill the gradients of all encoder rows after the frozen ones, all biases and all decoder rows with scale * sums over the pairs.

        add: these sums are added to what is there.
        """
        order_N = order_N.long()
        row_N, latent_N = pairs.row_N[order_N].long(), pairs.latent_N[order_N]
        bag_N = row_N * S_BGD.shape[1] + self._group(latent_N, group_ends)
        value_N, by_gradient_N = pairs.value_N[order_N] * scale, gradient_N[order_N] * scale
        first_F = start_F1[:-1]
        first = int(start_F1[n_frozen])
        W_dec_FD = F.embedding_bag(bag_N, S_BGD.view(-1, S_BGD.shape[2]), first_F, mode="sum", per_sample_weights=value_N)
        W_enc_FD = F.embedding_bag(
            row_N[first:], centred_BD, first_F[n_frozen:] - first, mode="sum", per_sample_weights=by_gradient_N[first:]
        )
        b_enc_F = torch.zeros_like(b_enc).index_add_(0, latent_N.long(), by_gradient_N)
        for gradient, sums in ((W_enc, W_enc_FD), (b_enc, b_enc_F), (W_dec, W_dec_FD)):
            gradient.add_(sums) if add else gradient.copy_(sums)

    def weighted_rows(self, factor_N: Tensor, rows_ND: Tensor) -> Tensor:
        """factor_N @ rows_ND."""
        return factor_N @ rows_ND

    @staticmethod
    def _group(latent_N: Tensor, group_ends: list[int]) -> Tensor:
        return torch.bucketize(latent_N, torch.tensor(group_ends, device=latent_N.device, dtype=latent_N.dtype), right=True)

    def keep_top(self, z_BK: Tensor, most: int) -> None:
        """In place: the largest `most` positive values of every row stay, ties by place; all others become 0."""
        z_BK.nan_to_num_(nan=0.0, posinf=torch.inf).clamp_min_(0)
        if most >= z_BK.shape[1]:
            return
        least_B1 = z_BK.topk(most, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        tied_BK = z_BK == least_B1
        left_B1 = most - (z_BK > least_B1).sum(dim=1, keepdim=True)
        z_BK.masked_fill_((z_BK < least_B1) | (tied_BK & (tied_BK.cumsum(dim=1) > left_B1)), 0)

    def gradient_squares(self, gradient_ND: Tensor, W_ND: Tensor | None, chunk: int = 4096) -> tuple[Tensor, Tensor | None]:
        """Sum of squares (float64) of the gradient without its component along each row of W, and that component as a factor of W."""
        if W_ND is None:
            return gradient_ND.double().square().sum(), None
        factors, total = [], torch.zeros((), dtype=torch.float64, device=W_ND.device)
        for part_ND, part_W_ND in zip(gradient_ND.split(chunk), W_ND.split(chunk), strict=True):
            inverse_N = 1 / (torch.linalg.vector_norm(part_W_ND, dim=1) + 1e-6)
            factors.append(torch.linalg.vecdot(part_ND, part_W_ND) * inverse_N * inverse_N)
            total += torch.addcmul(part_ND, factors[-1][:, None], part_W_ND, value=-1).double().square().sum()
        return total, torch.cat(factors)

    def adam(self, W, gradient, mean, square, parallel_N, clip, adam: AdamStep, unit: bool, rounded: Rounded | None, chunk: int = 4096) -> None:
        """One Adam update of the rows of a matrix (or of a vector), in place.

        parallel_N * W is taken out of the gradient first; unit: rows are then divided by their norm plus the dtype's epsilon;
        rounded: brought up to date with the new rows.
        """
        for start in range(0, len(W), chunk):
            here = slice(start, start + chunk)
            now = gradient[here]
            if parallel_N is not None:
                now = torch.addcmul(now, parallel_N[here, None], W[here], value=-1)
            now = now * clip
            mean[here].mul_(adam.beta1).add_(now, alpha=1 - adam.beta1)
            square[here].mul_(adam.beta2).addcmul_(now, now, value=1 - adam.beta2)
            W[here].addcdiv_(mean[here], square[here].sqrt().mul_(adam.correction).add_(adam.eps), value=-adam.step_size)
            if unit:
                W[here] /= torch.linalg.vector_norm(W[here], dim=1, keepdim=True) + torch.finfo(W.dtype).eps
        if rounded is not None:
            fresh = self.round(W, rounded.low_ND is not None)
            for old, new in zip((rounded.low_ND, rounded.norm_N, rounded.error_N), (fresh.low_ND, fresh.norm_N, fresh.error_N), strict=True):
                if old is not None:
                    old.copy_(new)


class AdamStep(NamedTuple):
    """What one step of Adam needs beside gradient and state: W -= step_size * mean / (sqrt(square) * correction + eps)."""

    beta1: float
    beta2: float
    eps: float
    step_size: float
    """learning rate / (1 - beta1 ** step)"""
    correction: float
    """1 / sqrt(1 - beta2 ** step)"""


def _sampled(a_BD: Tensor, b_FD: Tensor, row_N: Tensor, latent_N: Tensor) -> Tensor:
    """<a[row], b[latent]> for pairs sorted by row."""
    start_B1 = torch.searchsorted(row_N, torch.arange(len(a_BD) + 1, device=row_N.device, dtype=row_N.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # torch says so once per process
        pattern = torch.sparse_csr_tensor(
            start_B1, latent_N.long(), a_BD.new_zeros(len(latent_N)), (len(a_BD), len(b_FD)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, a_BD, b_FD.t(), beta=0).values()


class NativePairs(TorchPairs):
    """The compiled kernels; the methods are those of `TorchPairs`, the threads are torch's."""

    name = "compiled"

    def __init__(self) -> None:
        """Raises native.NotBuilt if the kernels cannot be had."""
        native.library()
        self._capacity = 1 << 16

    def round(self, rows_ND: Tensor, low: bool) -> Rounded:
        rounded = new_rounded(rows_ND, low)
        self._prepare(rows_ND, None, None, rounded)
        return rounded

    def centre(self, x_BD: Tensor, b_dec_D: Tensor, low: bool) -> tuple[Tensor, Rounded]:
        x_BD, centred_BD, rounded = x_BD.contiguous(), torch.empty_like(x_BD), new_rounded(x_BD, low)
        self._prepare(x_BD, b_dec_D, centred_BD, rounded)
        return centred_BD, rounded

    @staticmethod
    def _prepare(x_ND, b_dec_D, centred_ND, rounded: Rounded) -> None:
        native.call(
            "prepare_rows", x_ND.dtype, x_ND, b_dec_D, centred_ND, rounded.low_ND, rounded.norm_N, rounded.error_N, *x_ND.shape,
            native.threads(),
        )  # fmt: skip

    def scan(self, screen_BF, first_row, b_enc_F, latents, margin, cut, n_exempt) -> Candidates:
        low = native.Int(screen_BF.dtype == torch.bfloat16)
        dtype, (rows, width), workers = b_enc_F.dtype, screen_BF.shape, native.threads()
        while True:
            capacity = self._capacity
            row, latent = (torch.empty(workers, capacity, dtype=torch.int32) for _ in range(2))
            approx, margins = (torch.empty(workers, capacity, dtype=dtype) for _ in range(2))
            counts = torch.empty(workers, dtype=torch.int64)
            native.call(
                "scan", dtype, screen_BF, low, rows, first_row, width, n_exempt, b_enc_F, margin.row_a_B[first_row:], margin.row_c_B[first_row:],
                latents.norm_N, latents.error_N, margin.relative, margin.rounding, margin.absolute, cut, row, latent, approx, margins, capacity,
                counts, workers,
            )  # fmt: skip
            found = counts.tolist()
            if max(found) <= capacity:
                break
            self._capacity = max(found) * 5 // 4
        return Candidates(*(torch.cat([part[:n] for part, n in zip(parts, found, strict=True)]) for parts in (row, latent, approx, margins)))

    def refine(self, centred_BD, W_enc_FD, b_enc_F, candidates: Candidates, cut, n_exempt) -> tuple[Tensor, int]:
        value_N = torch.empty_like(candidates.approx_N)
        wrong = native.call(
            "refine", b_enc_F.dtype, centred_BD, W_enc_FD, b_enc_F, *candidates, cut, n_exempt, value_N, len(value_N),
            centred_BD.shape[1], native.threads(), returns=ctypes.c_int64,
        )  # fmt: skip
        return value_N, wrong

    def values(self, centred_BD, W_enc_FD, b_enc_F, row_N, latent_N) -> Tensor:
        value_N = torch.empty(len(row_N), dtype=b_enc_F.dtype)
        native.call(
            "refine", b_enc_F.dtype, centred_BD, W_enc_FD, b_enc_F, row_N, latent_N, None, None, 0.0, 0, value_N, len(value_N),
            centred_BD.shape[1], native.threads(), returns=ctypes.c_int64,
        )  # fmt: skip
        return value_N

    def count_digits(self, value_N, shift, prefix) -> Tensor:
        counts = torch.empty(1 << DIGIT_BITS, dtype=torch.int64)
        native.call("count_digits", value_N.dtype, value_N, len(value_N), native.Int(shift), prefix, counts)
        return counts

    def keep(self, row_N, latent_N, value_N, threshold, n_exempt, rows, dropped_N) -> Pairs:
        kept = Pairs(torch.empty(rows + 1, dtype=torch.int64), *(torch.empty_like(t) for t in (row_N, latent_N, value_N)))
        count = native.call(
            "keep", value_N.dtype, row_N, latent_N, value_N, dropped_N, len(row_N), threshold, n_exempt, rows, *kept,
            returns=ctypes.c_int64,
        )  # fmt: skip
        return Pairs(kept.start_B1, kept.row_N[:count], kept.latent_N[:count], kept.value_N[:count])

    def by_latent(self, latent_N, width) -> tuple[Tensor, Tensor]:
        start_F1, order_N = torch.empty(width + 1, dtype=torch.int64), torch.empty_like(latent_N)
        native.call("by_latent", None, latent_N, len(latent_N), width, start_F1, order_N)
        return start_F1, order_N

    def decode(self, x_BD, b_dec_D, W_dec_FD, pairs: Pairs, group_ends, S_BGD) -> tuple[Tensor, Tensor]:
        gradient_N, loss_B = torch.empty_like(pairs.value_N), torch.empty(len(x_BD), dtype=torch.float64)
        native.call(
            "decode", x_BD.dtype, x_BD.contiguous(), b_dec_D, W_dec_FD, pairs.start_B1, pairs.latent_N, pairs.value_N,
            torch.tensor(group_ends), *x_BD.shape, len(group_ends), S_BGD, gradient_N, loss_B, native.threads(),
        )  # fmt: skip
        return gradient_N, loss_B

    def weight_gradients(
        self, S_BGD, centred_BD, pairs: Pairs, gradient_N, start_F1, order_N, group_ends, n_frozen, scale, W_enc, b_enc, W_dec, add=False
    ) -> None:
        workers = native.threads()
        native.call(
            "weight_gradients", S_BGD.dtype, S_BGD, centred_BD, start_F1, order_N, pairs.row_N, pairs.value_N, gradient_N,
            torch.tensor(group_ends), len(b_enc), n_frozen, centred_BD.shape[1], len(group_ends), scale, W_enc, b_enc, W_dec,
            W_dec.new_empty(workers, 2, W_dec.shape[1]), add, workers,
        )  # fmt: skip

    def weighted_rows(self, factor_N, rows_ND) -> Tensor:
        rows, d = rows_ND.shape
        sums = rows_ND.new_empty(-(-rows // native.ROWS), d)
        native.call("weighted_rows", rows_ND.dtype, factor_N, rows_ND, sums, rows, d, native.threads())
        return sums.sum(dim=0)

    def keep_top(self, z_BK, most) -> None:
        native.call("keep_top", z_BK.dtype, z_BK, *z_BK.shape, most, native.threads())

    def gradient_squares(self, gradient_ND, W_ND) -> tuple[Tensor, Tensor | None]:
        rows, d = gradient_ND.shape
        sums = torch.empty(-(-rows // native.ROWS), dtype=torch.float64)
        parallel_N = None if W_ND is None else gradient_ND.new_empty(rows)
        native.call("gradient_squares", gradient_ND.dtype, gradient_ND, W_ND, parallel_N, sums, rows, d, native.threads())
        return sums.sum(), parallel_N

    def adam(self, W, gradient, mean, square, parallel_N, clip, adam: AdamStep, unit, rounded: Rounded | None) -> None:
        rows, d = W.shape if W.ndim == 2 else (1, len(W))
        low, norm, error = (None, None, None) if rounded is None else (rounded.low_ND, rounded.norm_N, rounded.error_N)
        native.call(
            "adam", W.dtype, W, gradient, mean, square, parallel_N, rows, d, clip, *adam[:3], adam.step_size, adam.correction, unit,
            torch.finfo(W.dtype).eps, low, norm, error, native.threads(),
        )  # fmt: skip


def new_rounded(rows_ND: Tensor, low: bool) -> Rounded:
    """Room for the rounding of these rows."""
    n = len(rows_ND)
    low_ND = torch.empty(rows_ND.shape, dtype=torch.bfloat16, device=rows_ND.device) if low else None
    return Rounded(low_ND, rows_ND.new_empty(n), rows_ND.new_empty(n))


def pairs_on(device: torch.device | str, kernels: str = "auto", dtype: torch.dtype = torch.float32) -> TorchPairs:
    """The operations for tensors on this device: C kernels on CPUs, Triton's on CUDA devices (float32 only), else plain torch.

    kernels: `auto` (a warning says so where plain torch has to do), `compiled` (raises native.NotBuilt where impossible), `torch`.
    Raises ValueError for a CUDA device that is not the current one, where kernels would be started.
    """
    device = torch.device(device)
    kind = device.type
    if kind == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(f"the SAE is on {device}, the current device is cuda:{torch.cuda.current_device()}: call torch.cuda.set_device first")
    if kernels == "torch" or (kernels == "auto" and kind not in ("cpu", "cuda")):
        return TorchPairs()
    try:
        if kind == "cpu":
            return NativePairs()
        if kind != "cuda" or dtype != torch.float32:
            raise native.NotBuilt(f"there are none for {dtype} on {kind}")
        try:
            from dmsae_ray.sae.ops.cuda_ops import TritonPairs  # triton comes with torch's CUDA wheels only
        except ImportError as error:
            raise native.NotBuilt(f"triton cannot be imported ({error})") from error
        return TritonPairs()
    except native.NotBuilt as error:
        if kernels == "compiled":
            raise
        warnings.warn(f"no compiled kernels: {error}. Training runs in plain torch, several times slower", stacklevel=2)
        return TorchPairs()
