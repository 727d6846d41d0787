"""The operations on pairs by the compiled kernels, for CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dmsae_ray.sae.ops import native
from dmsae_ray.sae.ops.pairs import DIGIT_BITS, AdamStep, Candidates, Pairs, Rounded, new_rounded
from dmsae_ray.sae.ops.torch_ops import TorchPairs


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
            "prepare_rows",
            x_ND.dtype,
            x_ND,
            b_dec_D,
            centred_ND,
            rounded.low_ND,
            rounded.norm_N,
            rounded.error_N,
            *x_ND.shape,
            native.threads(),
        )

    def scan(self, screen_BF, first_row, b_enc_F, latents, margin, cut, n_exempt) -> Candidates:
        low = native.Int(screen_BF.dtype == torch.bfloat16)
        dtype, (rows, width), workers = b_enc_F.dtype, screen_BF.shape, native.threads()
        while True:
            capacity = self._capacity
            row, latent = (torch.empty(workers, capacity, dtype=torch.int32) for _ in range(2))
            approx, margins = (torch.empty(workers, capacity, dtype=dtype) for _ in range(2))
            counts = torch.empty(workers, dtype=torch.int64)
            native.call(
                "scan",
                dtype,
                screen_BF,
                low,
                rows,
                first_row,
                width,
                n_exempt,
                b_enc_F,
                margin.row_a_B[first_row:],
                margin.row_c_B[first_row:],
                latents.norm_N,
                latents.error_N,
                margin.relative,
                margin.rounding,
                margin.absolute,
                cut,
                row,
                latent,
                approx,
                margins,
                capacity,
                counts,
                workers,
            )
            found = counts.tolist()
            if max(found) <= capacity:
                break
            self._capacity = max(found) * 5 // 4
        return Candidates(
            *(
                torch.cat([part[:n] for part, n in zip(parts, found, strict=True)])
                for parts in (row, latent, approx, margins)
            )
        )

    def refine(self, centred_BD, W_enc_FD, b_enc_F, candidates: Candidates, cut, n_exempt) -> tuple[Tensor, int]:
        value_N = torch.empty_like(candidates.approx_N)
        wrong = native.call(
            "refine",
            b_enc_F.dtype,
            centred_BD,
            W_enc_FD,
            b_enc_F,
            *candidates,
            cut,
            n_exempt,
            value_N,
            len(value_N),
            centred_BD.shape[1],
            native.threads(),
            returns=ctypes.c_int64,
        )
        return value_N, wrong

    def values(self, centred_BD, W_enc_FD, b_enc_F, row_N, latent_N) -> Tensor:
        value_N = torch.empty(len(row_N), dtype=b_enc_F.dtype)
        native.call(
            "refine",
            b_enc_F.dtype,
            centred_BD,
            W_enc_FD,
            b_enc_F,
            row_N,
            latent_N,
            None,
            None,
            0.0,
            0,
            value_N,
            len(value_N),
            centred_BD.shape[1],
            native.threads(),
            returns=ctypes.c_int64,
        )
        return value_N

    def count_digits(self, value_N, shift, prefix) -> Tensor:
        counts = torch.empty(1 << DIGIT_BITS, dtype=torch.int64)
        native.call("count_digits", value_N.dtype, value_N, len(value_N), native.Int(shift), prefix, counts)
        return counts

    def keep(self, row_N, latent_N, value_N, threshold, n_exempt, rows, dropped_N) -> Pairs:
        kept = Pairs(
            torch.empty(rows + 1, dtype=torch.int64), *(torch.empty_like(t) for t in (row_N, latent_N, value_N))
        )
        count = native.call(
            "keep",
            value_N.dtype,
            row_N,
            latent_N,
            value_N,
            dropped_N,
            len(row_N),
            threshold,
            n_exempt,
            rows,
            *kept,
            returns=ctypes.c_int64,
        )
        return Pairs(kept.start_B1, kept.row_N[:count], kept.latent_N[:count], kept.value_N[:count])

    def by_latent(self, latent_N, width) -> tuple[Tensor, Tensor]:
        start_F1, order_N = torch.empty(width + 1, dtype=torch.int64), torch.empty_like(latent_N)
        native.call("by_latent", None, latent_N, len(latent_N), width, start_F1, order_N)
        return start_F1, order_N

    def decode(self, x_BD, b_dec_D, W_dec_FD, pairs: Pairs, group_ends, S_BGD) -> tuple[Tensor, Tensor]:
        gradient_N, loss_B = torch.empty_like(pairs.value_N), torch.empty(len(x_BD), dtype=torch.float64)
        native.call(
            "decode",
            x_BD.dtype,
            x_BD.contiguous(),
            b_dec_D,
            W_dec_FD,
            pairs.start_B1,
            pairs.latent_N,
            pairs.value_N,
            torch.tensor(group_ends),
            *x_BD.shape,
            len(group_ends),
            S_BGD,
            gradient_N,
            loss_B,
            native.threads(),
        )
        return gradient_N, loss_B

    def weight_gradients(
        self,
        S_BGD,
        centred_BD,
        pairs: Pairs,
        gradient_N,
        start_F1,
        order_N,
        group_ends,
        n_frozen,
        scale,
        W_enc,
        b_enc,
        W_dec,
        add=False,
    ) -> None:
        workers = native.threads()
        native.call(
            "weight_gradients",
            S_BGD.dtype,
            S_BGD,
            centred_BD,
            start_F1,
            order_N,
            pairs.row_N,
            pairs.value_N,
            gradient_N,
            torch.tensor(group_ends),
            len(b_enc),
            n_frozen,
            centred_BD.shape[1],
            len(group_ends),
            scale,
            W_enc,
            b_enc,
            W_dec,
            W_dec.new_empty(workers, 2, W_dec.shape[1]),
            add,
            workers,
        )

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
        native.call(
            "gradient_squares", gradient_ND.dtype, gradient_ND, W_ND, parallel_N, sums, rows, d, native.threads()
        )
        return sums.sum(), parallel_N

    def adam(self, W, gradient, mean, square, parallel_N, clip, adam: AdamStep, unit, rounded: Rounded | None) -> None:
        rows, d = W.shape if W.ndim == 2 else (1, len(W))
        low, norm, error = (None, None, None) if rounded is None else (rounded.low_ND, rounded.norm_N, rounded.error_N)
        native.call(
            "adam",
            W.dtype,
            W,
            gradient,
            mean,
            square,
            parallel_N,
            rows,
            d,
            clip,
            *adam[:3],
            adam.step_size,
            adam.correction,
            unit,
            torch.finfo(W.dtype).eps,
            low,
            norm,
            error,
            native.threads(),
        )
