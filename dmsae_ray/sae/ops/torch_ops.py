"""The operations on pairs in plain torch, for any device: what the compiled ones are compared with."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_ray.sae.ops.pairs import DIGIT_BITS, AdamStep, Candidates, Margin, Pairs, Rounded

CHUNK = 4096
"""Rows of a matrix that are rounded, added up or updated at a time: what is made of them in between stays small. Part
of the order of sums."""


class TorchPairs:
    """Plain torch: the reference of the compiled kernels, and what runs where there are none."""

    name = "torch"
    fused = False
    """whether `screened` does product and scan in one"""

    def round(self, rows_ND: Tensor, low: bool) -> Rounded:
        """bf16 copy of the rows (if `low`), norms, and norms of the difference."""
        norm_N = torch.linalg.vector_norm(rows_ND, dim=1, dtype=torch.float64).to(rows_ND.dtype)
        if not low:
            return Rounded(None, norm_N, torch.zeros_like(norm_N))
        low_ND = rows_ND.bfloat16()
        error_N = torch.cat(
            [
                torch.linalg.vector_norm(part_ND - part_low_ND.to(part_ND.dtype), dim=1, dtype=torch.float64)
                for part_ND, part_low_ND in zip(rows_ND.split(CHUNK), low_ND.split(CHUNK), strict=True)
            ]
        )
        return Rounded(low_ND, norm_N, error_N.to(rows_ND.dtype))

    def centre(self, x_BD: Tensor, b_dec_D: Tensor, low: bool) -> tuple[Tensor, Rounded]:
        """x - b_dec, and `round` of it."""
        centred_BD = x_BD - b_dec_D
        return centred_BD, self.round(centred_BD, low)

    def scan(
        self,
        screen_BF: Tensor,
        first_row: int,
        b_enc_F: Tensor,
        latents: Rounded,
        margin: Margin,
        cut: float,
        n_exempt: int,
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
            found.append(
                (
                    (row_N + here.start).int(),
                    latent_N.int(),
                    at_BF[row_N, latent_N],
                    reach_BF[row_N, latent_N],
                )
            )
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
        """One pass of a radix select: how many positive values whose bits above the digit equal `prefix` have which
        digit.
        """
        bits_N = value_N[value_N > 0].view(torch.int32 if value_N.dtype == torch.float32 else torch.int64).long()
        if shift + DIGIT_BITS < 8 * value_N.element_size():
            bits_N = bits_N[bits_N >> (shift + DIGIT_BITS) == prefix]
        return torch.bincount((bits_N >> shift) & ((1 << DIGIT_BITS) - 1), minlength=1 << DIGIT_BITS)

    def keep(
        self,
        row_N: Tensor,
        latent_N: Tensor,
        value_N: Tensor,
        threshold: float,
        n_exempt: int,
        rows: int,
        dropped_N: Tensor | None,
    ) -> Pairs:
        """Positive pairs at or above the threshold (the first n_exempt latents: all positive ones), but for
        dropped_N.
        """
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
        """Gradients <S[row, group], decoder row> of the pairs' activations [N], and each row's squared error over all
        prefixes [B].

        S_BGD is filled: S[b, g] = sum over h >= g of x_hat_h - x, so S[:, -1] is the residual of the whole SAE.
        """
        torch.cumsum(self.group_sums(W_dec_FD, pairs, group_ends), dim=1, out=S_BGD)
        loss_B = self.errors(x_BD, b_dec_D, S_BGD)
        return self.along_errors(S_BGD, W_dec_FD, pairs, group_ends), loss_B

    def group_sums(self, W_dec_FD: Tensor, pairs: Pairs, group_ends: list[int]) -> Tensor:
        """What the pairs of every row and group add up to, [B, G, D]: the first step of `decode`, where latents are
        spread over ranks.
        """
        n_rows, n_groups = len(pairs.start_B1) - 1, len(group_ends)
        bag_N = pairs.row_N.long() * n_groups + self._group(pairs.latent_N, group_ends)
        first = torch.searchsorted(bag_N, torch.arange(n_rows * n_groups, device=bag_N.device))
        sums = F.embedding_bag(pairs.latent_N.long(), W_dec_FD, first, mode="sum", per_sample_weights=pairs.value_N)
        return sums.view(n_rows, n_groups, -1)

    def errors(self, x_BD: Tensor, b_dec_D: Tensor, sums_BGD: Tensor) -> Tensor:
        """The second step: turns, in place, running sums over groups into S; returns each row's squared error over all
        prefixes [B].
        """
        sums_BGD += (b_dec_D - x_BD)[:, None]
        n_groups = sums_BGD.shape[1]
        loss_B = torch.stack([sums_BGD[:, g].double().square().sum(dim=1) for g in range(n_groups)]).sum(dim=0)
        for g in range(n_groups - 2, -1, -1):
            sums_BGD[:, g] += sums_BGD[:, g + 1]
        return loss_B

    def along_errors(self, S_BGD: Tensor, W_dec_FD: Tensor, pairs: Pairs, group_ends: list[int]) -> Tensor:
        """The third step: gradients <S[row, group], decoder row> of the pairs' activations [N]."""
        bag_N = pairs.row_N * S_BGD.shape[1] + self._group(pairs.latent_N, group_ends).int()
        return self.values(
            S_BGD.view(-1, S_BGD.shape[2]), W_dec_FD, W_dec_FD.new_zeros(len(W_dec_FD)), bag_N, pairs.latent_N
        )

    def weight_gradients(
        self,
        S_BGD: Tensor,
        centred_BD: Tensor,
        pairs: Pairs,
        gradient_N: Tensor,
        start_F1: Tensor,
        order_N: Tensor,
        group_ends: list[int],
        n_frozen: int,
        scale: float,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        add: bool = False,
    ) -> None:
        """Fill the gradients of all encoder rows after the frozen ones, all biases and all decoder rows with scale *
        sums over the pairs.

        add: these sums are added to what is there.
        """
        order_N = order_N.long()
        row_N, latent_N = pairs.row_N[order_N].long(), pairs.latent_N[order_N]
        bag_N = row_N * S_BGD.shape[1] + self._group(latent_N, group_ends)
        value_N, by_gradient_N = pairs.value_N[order_N] * scale, gradient_N[order_N] * scale
        first_F = start_F1[:-1]
        first = int(start_F1[n_frozen])
        W_dec_FD = F.embedding_bag(
            bag_N, S_BGD.view(-1, S_BGD.shape[2]), first_F, mode="sum", per_sample_weights=value_N
        )
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
        return torch.bucketize(
            latent_N, torch.tensor(group_ends, device=latent_N.device, dtype=latent_N.dtype), right=True
        )

    def keep_top(self, z_BK: Tensor, most: int) -> None:
        """In place: the largest `most` positive values of every row stay, ties by place; all others become 0."""
        z_BK.nan_to_num_(nan=0.0, posinf=torch.inf).clamp_min_(0)
        if most >= z_BK.shape[1]:
            return
        least_B1 = z_BK.topk(most, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        tied_BK = z_BK == least_B1
        left_B1 = most - (z_BK > least_B1).sum(dim=1, keepdim=True)
        z_BK.masked_fill_((z_BK < least_B1) | (tied_BK & (tied_BK.cumsum(dim=1) > left_B1)), 0)

    def gradient_squares(self, gradient_ND: Tensor, W_ND: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sum of squares (float64) of the gradient without its component along each row of W, and that component as a
        factor of W.
        """
        if W_ND is None:
            return gradient_ND.double().square().sum(), None
        factors, total = [], torch.zeros((), dtype=torch.float64, device=W_ND.device)
        for part_ND, part_W_ND in zip(gradient_ND.split(CHUNK), W_ND.split(CHUNK), strict=True):
            inverse_N = 1 / (torch.linalg.vector_norm(part_W_ND, dim=1) + 1e-6)
            factors.append(torch.linalg.vecdot(part_ND, part_W_ND) * inverse_N * inverse_N)
            total += torch.addcmul(part_ND, factors[-1][:, None], part_W_ND, value=-1).double().square().sum()
        return total, torch.cat(factors)

    def adam(
        self,
        W,
        gradient,
        mean,
        square,
        parallel_N,
        clip,
        adam: AdamStep,
        unit: bool,
        rounded: Rounded | None,
    ) -> None:
        """One Adam update of the rows of a matrix (or of a vector), in place.

        parallel_N * W is taken out of the gradient first; unit: rows are then divided by their norm plus the dtype's
        epsilon;
        rounded: brought up to date with the new rows.
        """
        for start in range(0, len(W), CHUNK):
            here = slice(start, start + CHUNK)
            now = gradient[here]
            if parallel_N is not None:
                now = torch.addcmul(now, parallel_N[here, None], W[here], value=-1)
            now = now * clip
            mean[here].mul_(adam.beta1).add_(now, alpha=1 - adam.beta1)
            square[here].mul_(adam.beta2).addcmul_(now, now, value=1 - adam.beta2)
            W[here].addcdiv_(
                mean[here], square[here].sqrt().mul_(adam.correction).add_(adam.eps), value=-adam.step_size
            )
            if unit:
                W[here] /= torch.linalg.vector_norm(W[here], dim=1, keepdim=True) + torch.finfo(W.dtype).eps
        if rounded is not None:
            fresh = self.round(W, rounded.low_ND is not None)
            for old, new in zip(
                (rounded.low_ND, rounded.norm_N, rounded.error_N),
                (fresh.low_ND, fresh.norm_N, fresh.error_N),
                strict=True,
            ):
                if old is not None:
                    old.copy_(new)


def _sampled(a_BD: Tensor, b_FD: Tensor, row_N: Tensor, latent_N: Tensor) -> Tensor:
    """<a[row], b[latent]> for pairs sorted by row."""
    start_B1 = torch.searchsorted(row_N, torch.arange(len(a_BD) + 1, device=row_N.device, dtype=row_N.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Sparse CSR tensor support is in beta"
        )  # torch says so once per process
        pattern = torch.sparse_csr_tensor(
            start_B1, latent_N.long(), a_BD.new_zeros(len(latent_N)), (len(a_BD), len(b_FD)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, a_BD, b_FD.t(), beta=0).values()
