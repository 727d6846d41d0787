"""`TorchPairs` by Triton kernels, for CUDA devices. Needs triton, which torch's CUDA wheels bring.

Shapes: as in `pairs.py`; C places for candidates, of which the first ones are taken. Weights and batches are float32.

Nothing here waits for the device, but for the methods that return Python numbers (`refine`; `screened` of a gate over
several ranks). Lists whose length only the device knows are as long as they can get and end in padding: row B, latent
F, value 0 or less. AuxK's selection (`keep_top`) and the sorting are torch's.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dmsae_ray.sae.ops import triton_rows, triton_screen, triton_select, triton_sparse
from dmsae_ray.sae.ops.pairs import DIGIT_BITS, AdamStep, Candidates, Margin, Pairs, Rounded, new_rounded
from dmsae_ray.sae.ops.torch_ops import TorchPairs

TILE = {
    torch.bfloat16: {"ROWS": 128, "LATENTS": 128, "DEPTH": 64, "TOGETHER": 8, "num_warps": 8, "num_stages": 3},
    torch.float32: {"ROWS": 64, "LATENTS": 64, "DEPTH": 32, "TOGETHER": 8, "num_warps": 8, "num_stages": 3},
}
"""Tiles of the product."""

SPARSE = 512
"""Most columns of one program that adds up rows."""

LONG, SHORT = 16, 4
"""Rows that such a program asks memory for at a time, while there are so many, and after that."""

SAMPLED = {"PAIRS": 16, "BLOCK": 128, "num_warps": 4}
"""Pairs of one program that computes values. BLOCK is part of the definition of a value on this device."""

COUNTED = 1024
"""Values of one program that counts digits."""

LONGEST_ROW = 1 << 14
"""One program holds a row."""

KEPT_ENDS = 64
"""Lists of prefix ends kept on the device; sampled ones are new in every step."""

FLAT = 1024
"""A vector is updated as rows of so many numbers."""


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Every kernel is started here. Products and sums are fused, whatever a version of triton does by default."""
    if min(grid):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _row_block(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    if block > LONGEST_ROW:
        raise ValueError(f"d {d} is more than the {LONGEST_ROW} of the Triton kernels: set train.kernels to torch")
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


class TritonPairs(TorchPairs):
    """The methods are those of `TorchPairs`; `screened` stands for the product and `scan`."""

    name = "triton"
    fused = True

    def __init__(self) -> None:
        self.places = 0
        """for candidates"""
        self._ends: dict[tuple, Tensor] = {}

    def make_room(self, candidates: int) -> None:
        """There were so many, and too few places: the next time there are enough."""
        self.places = max(self.places, candidates * 5 // 4)

    def round(self, rows_ND: Tensor, low: bool) -> Rounded:
        return self._prepare(rows_ND, None, None, low)

    def centre(self, x_BD: Tensor, b_dec_D: Tensor, low: bool) -> tuple[Tensor, Rounded]:
        centred_BD = torch.empty(x_BD.shape, dtype=x_BD.dtype, device=x_BD.device)
        return centred_BD, self._prepare(x_BD.contiguous(), b_dec_D, centred_BD, low)

    @staticmethod
    def _prepare(x_ND: Tensor, b_dec_D: Tensor | None, centred_ND: Tensor | None, low: bool) -> Rounded:
        rows, d = x_ND.shape
        rounded = new_rounded(x_ND, low)
        launch(triton_rows.prepare_rows, (rows,), x_ND, b_dec_D, centred_ND, *_bits_of(rounded), d, **_row_block(d))
        return rounded

    def screened(
        self,
        left_BD: Tensor,
        right_FD: Tensor,
        b_enc_F: Tensor,
        latents: Rounded,
        margin: Margin,
        cut: float,
        n_exempt: int,
    ) -> Candidates:
        """Pairs whose value can reach `cut`, as `scan` finds them in the product left_BD @ right_FD.T, without writing
        that.

        Waits for the device: the list is as long as what was found.
        """
        cut_1 = b_enc_F.new_full((), cut)
        while True:
            places = max(self.places, 1 << 16)
            found, count = self.append(left_BD, right_FD, b_enc_F, latents, margin, cut_1, n_exempt, places)
            n = int(count)
            if n <= places:
                return Candidates(*(part[:n] for part in found))
            self.make_room(n)

    def append(
        self,
        left_BD: Tensor,
        right_FD: Tensor,
        b_enc_F: Tensor,
        latents: Rounded,
        margin: Margin,
        cut: Tensor,
        n_exempt: int,
        capacity: int,
        go: Tensor | None = None,
        before: tuple[Candidates, Tensor] | None = None,
    ) -> tuple[Candidates, Tensor]:
        """Pairs that can reach the number in `cut`, sorted by row, then latent, and how many there are (int32, 0-dim).

        More than `capacity` are counted, not stored. go: where it holds a 0, the result is `before`, whose capacity was
        the same.
        """
        n_rows, width = len(left_BD), len(right_FD)
        kind = torch.int32 if (n_rows + 1) * width < 1 << 31 else torch.int64
        key_C = torch.full((capacity,), n_rows * width, dtype=kind, device=left_BD.device)
        approx_C = b_enc_F.new_zeros(capacity)
        count = torch.zeros((), dtype=torch.int32, device=left_BD.device)
        launch(
            triton_screen.append,
            self._tiles(left_BD, right_FD),
            left_BD,
            right_FD,
            b_enc_F,
            margin.row_a_B,
            margin.row_c_B,
            latents.norm_N,
            latents.error_N,
            cut,
            _always(count) if go is None else go,
            key_C,
            approx_C,
            count,
            n_rows,
            width,
            left_BD.shape[1],
            n_exempt,
            capacity,
            margin.rounding,
            margin.absolute,
            **TILE[left_BD.dtype],
        )
        key_C, order_C = key_C.sort()
        row_C = torch.div(key_C, width, rounding_mode="floor").int()
        latent_C = torch.where(row_C < n_rows, key_C - row_C.to(kind) * width, width).int()
        at_C = approx_C[order_C]
        # Not stored by the kernel, whose registers are dear. Margins are so much wider than need be that roundings do
        # not matter.
        r, j = row_C.clamp(max=n_rows - 1), latent_C.clamp(max=width - 1)
        margin_C = margin.row_a_B[r] * latents.norm_N[j] + margin.row_c_B[r] * latents.error_N[j]
        margin_C += margin.rounding * at_C.abs() + margin.absolute
        found = Candidates(row_C, latent_C, at_C, margin_C)
        if before is not None:
            found = Candidates(*(torch.where(go != 0, new, old) for new, old in zip(found, before[0], strict=True)))
            count = torch.where(go != 0, count, before[1])
        return found, count

    def sure_level(
        self,
        left_BD: Tensor,
        right_FD: Tensor,
        b_enc_F: Tensor,
        latents: Rounded,
        margin: Margin,
        n_exempt: int,
        wanted: Tensor,
        go: Tensor,
    ) -> Tensor:
        """The largest number of few bits that at least `wanted` values are sure to reach (0: not so many are surely
        positive), 0-dim.

        The product is made anew, and all pairs counted: for batches that the guess did not fit. go: where it holds a 0,
        nothing is done, and the number is 0.
        """
        shift = 31 - DIGIT_BITS  # the exponent, and three bits more: levels are at most an eighth apart
        counts = _counts(left_BD)
        launch(
            triton_screen.count_sure,
            self._tiles(left_BD, right_FD),
            left_BD,
            right_FD,
            b_enc_F,
            margin.row_a_B,
            margin.row_c_B,
            latents.norm_N,
            latents.error_N,
            go,
            counts,
            len(left_BD),
            len(right_FD),
            left_BD.shape[1],
            n_exempt,
            margin.rounding,
            margin.absolute,
            SHIFT=shift,
            DIGITS=1 << DIGIT_BITS,
            **TILE[left_BD.dtype],
        )
        state = _state(wanted)
        launch(triton_select.choose_digit, (1,), counts, state, BITS=DIGIT_BITS)
        return _found(state, shift)

    @staticmethod
    def _tiles(left_BD: Tensor, right_FD: Tensor) -> tuple[int]:
        tile = TILE[left_BD.dtype]
        return (triton.cdiv(len(left_BD), tile["ROWS"]) * triton.cdiv(len(right_FD), tile["LATENTS"]),)

    def refine(self, centred_BD, W_enc_FD, b_enc_F, candidates: Candidates, cut, n_exempt) -> tuple[Tensor, int]:
        value_N, wrong = self.refined(centred_BD, W_enc_FD, b_enc_F, candidates, b_enc_F.new_full((), cut), n_exempt)
        return value_N, int(wrong)

    def refined(
        self, centred_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, candidates: Candidates, cut: Tensor, n_exempt: int
    ) -> tuple[Tensor, Tensor]:
        """`refine` for a cut on the device, with padding allowed; the count of wrong margins is int32, 0-dim."""
        wrong = torch.zeros((), dtype=torch.int32, device=b_enc_F.device)
        return self._sampled(centred_BD, W_enc_FD, b_enc_F, *candidates, cut, wrong, n_exempt), wrong

    def values(self, centred_BD, W_enc_FD, b_enc_F, row_N, latent_N) -> Tensor:
        return self._sampled(centred_BD, W_enc_FD, b_enc_F, row_N, latent_N)

    @staticmethod
    def _sampled(
        a_ND, W_FD, bias_F, row_N, latent_N, approx_N=None, margin_N=None, cut=None, wrong=None, n_exempt=0
    ) -> Tensor:
        n, value_N = len(row_N), W_FD.new_empty(len(row_N))
        launch(
            triton_sparse.sampled,
            (triton.cdiv(n, SAMPLED["PAIRS"]),),
            a_ND,
            W_FD,
            bias_F,
            row_N,
            latent_N,
            approx_N,
            margin_N,
            cut,
            value_N,
            wrong,
            n,
            len(a_ND),
            n_exempt,
            W_FD.shape[1],
            **SAMPLED,
        )
        return value_N

    def count_digits(self, value_N, shift, prefix) -> Tensor:
        counts, state = _counts(value_N), torch.tensor([prefix, 0, 1], device=value_N.device)
        self._count(value_N, counts, state, shift, first=shift + DIGIT_BITS >= 32)
        return counts.long()

    @staticmethod
    def _count(value_N: Tensor, counts: Tensor, state: Tensor, shift: int, first: bool) -> None:
        launch(
            triton_select.count_digits,
            (triton.cdiv(len(value_N), COUNTED),),
            value_N,
            counts,
            state,
            len(value_N),
            SHIFT=shift,
            BITS=DIGIT_BITS,
            FIRST=first,
            BLOCK=COUNTED,
        )

    def kth_largest(self, value_N: Tensor, k: Tensor) -> Tensor:
        """The k-th largest value (k: int64, 0-dim, at least 1), 0-dim; 0 if there are fewer than k positive ones."""
        counts, state = _counts(value_N), _state(k)
        for shift in range(31 // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS):
            self._count(value_N, counts, state, shift, first=shift + DIGIT_BITS >= 32)
            launch(triton_select.choose_digit, (1,), counts, state, BITS=DIGIT_BITS)
        return _found(state, 0)

    def _group_ends(self, group_ends: list[int], device: torch.device) -> Tensor:
        """On the device, sent there once, without waiting for it."""
        key = (*group_ends, device)
        if key not in self._ends:
            if len(self._ends) >= KEPT_ENDS:
                self._ends.clear()
            ends = torch.tensor(group_ends, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._ends[key] = ends.to(device, non_blocking=True)
        return self._ends[key]

    def decode(self, x_BD, b_dec_D, W_dec_FD, pairs: Pairs, group_ends, S_BGD) -> tuple[Tensor, Tensor]:
        n_rows, n_groups, d = S_BGD.shape
        group_N = torch.bucketize(pairs.latent_N, self._group_ends(group_ends, x_BD.device), right=True, out_int32=True)
        bag_N = pairs.row_N * n_groups + group_N
        bags = torch.arange(n_rows * n_groups + 1, dtype=torch.int32, device=x_BD.device)
        bag_start = torch.searchsorted(bag_N, bags, out_int32=True)
        block = min(triton.next_power_of_2(d), SPARSE)
        squares = torch.empty(n_rows, triton.cdiv(d, block), dtype=torch.float64, device=x_BD.device)
        launch(
            triton_sparse.decode,
            squares.shape,
            x_BD.contiguous(),
            b_dec_D,
            W_dec_FD,
            bag_start,
            pairs.latent_N,
            pairs.value_N,
            S_BGD,
            squares,
            d,
            G=n_groups,
            BLOCK=block,
            LONG=LONG,
            SHORT=SHORT,
            num_warps=_sparse_warps(block),
        )
        return self._sampled(S_BGD.view(-1, d), W_dec_FD, None, bag_N, pairs.latent_N), squares.sum(dim=1)

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
        width, d = W_dec.shape
        block = min(triton.next_power_of_2(d), SPARSE)
        launch(
            triton_sparse.weight_gradients,
            (width, triton.cdiv(d, block)),
            S_BGD,
            centred_BD,
            start_F1,
            order_N,
            pairs.row_N,
            pairs.value_N,
            gradient_N,
            self._group_ends(group_ends, S_BGD.device),
            W_enc,
            b_enc,
            W_dec,
            scale,
            n_frozen,
            d,
            G=S_BGD.shape[1],
            ADD=add,
            BLOCK=block,
            LONG=LONG,
            SHORT=SHORT,
            num_warps=_sparse_warps(block),
        )

    def gradient_squares(self, gradient_ND, W_ND) -> tuple[Tensor, Tensor | None]:
        rows, d = gradient_ND.shape
        squares = torch.empty(rows, dtype=torch.float64, device=gradient_ND.device)
        parallel_N = None if W_ND is None else gradient_ND.new_empty(rows)
        launch(triton_rows.gradient_squares, (rows,), gradient_ND, W_ND, parallel_N, squares, d, **_row_block(d))
        return squares.sum(), parallel_N

    def adam(
        self,
        W,
        gradient,
        mean,
        square,
        parallel_N,
        clip: float | Tensor,
        adam: AdamStep,
        unit,
        rounded: Rounded | None,
        go: Tensor | None = None,
    ) -> None:
        """As `TorchPairs.adam`. clip may be on the device. go: where it holds a 0, nothing is changed."""
        rows, d = W.shape if W.ndim == 2 else (triton.cdiv(len(W), FLAT), FLAT)
        clip = clip.to(W.dtype) if isinstance(clip, Tensor) else W.new_full((), clip)
        copy = (None, None, None) if rounded is None else _bits_of(rounded)
        launch(
            triton_rows.adam,
            (rows,),
            W,
            gradient,
            mean,
            square,
            parallel_N,
            clip,
            _always(clip) if go is None else go,
            *copy,
            adam.step_size,
            adam.correction,
            W.numel(),
            d,
            BETA1=adam.beta1,
            BETA2=adam.beta2,
            EPS=adam.eps,
            UNIT_EPS=torch.finfo(W.dtype).eps if unit else None,
            **_row_block(d),
        )


def _bits_of(rounded: Rounded) -> tuple[Tensor | None, Tensor, Tensor]:
    return None if rounded.low_ND is None else rounded.low_ND.view(torch.int16), rounded.norm_N, rounded.error_N


def _sparse_warps(block: int) -> int:
    return min(max(block // 128, 1), 4)


def _always(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.int32, device=like.device)


def _counts(like: Tensor) -> Tensor:
    return torch.zeros(1 << DIGIT_BITS, dtype=torch.int32, device=like.device)


def _state(k: Tensor) -> Tensor:
    """Of a radix select, see triton_select.py."""
    return torch.stack([torch.zeros_like(k), k, torch.ones_like(k)])


def _found(state: Tensor, shift: int) -> Tensor:
    """The number whose leading bits were found, 0-dim."""
    return torch.where(state[2] != 0, state[0] << shift, 0).int().view(torch.float32)
