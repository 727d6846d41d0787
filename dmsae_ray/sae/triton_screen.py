"""The fused screen: a product whose epilogue hands on the few pairs that may be kept, so that batch x width is never written.

x [B, D] and W [F, D] are contiguous, both bf16 or both float32; sums are float32. See `screen.py` for margins, `device_gate.py`
for how the kernels are used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _screened(
    x, W, b_enc, row_a, row_c, norm, error, n_rows, width, d, n_exempt, rounding, absolute,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile: row [ROWS, 1], latent [1, LATENTS], approximate values and what they can be off, and which of them exist.

    Tiles are dealt so that TOGETHER blocks of rows read the same latents while those are in the cache.
    """
    row_tiles, latent_tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(width, LATENTS)
    tile = tl.program_id(0)
    band = tile // (TOGETHER * latent_tiles)
    high = tl.minimum(row_tiles - band * TOGETHER, TOGETHER)
    inner = tile % (TOGETHER * latent_tiles)
    row = (band * TOGETHER + inner % high) * ROWS + tl.arange(0, ROWS)
    latent = (inner // high) * LATENTS + tl.arange(0, LATENTS)
    here, there = row < n_rows, latent < width
    column = tl.arange(0, DEPTH)
    left = x + row.to(tl.int64)[:, None] * d + column[None, :]
    right = W + latent.to(tl.int64)[None, :] * d + column[:, None]
    product = tl.zeros([ROWS, LATENTS], tl.float32)
    for start in range(0, d, DEPTH):
        a = tl.load(left + start, mask=here[:, None] & (start + column < d)[None, :], other=0.0)
        b = tl.load(right + start, mask=there[None, :] & (start + column < d)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
    at = product + tl.load(b_enc + latent, mask=there, other=0.0)[None, :]
    a = tl.load(row_a + row, mask=here, other=0.0)
    c = tl.load(row_c + row, mask=here, other=0.0)
    norms, errors = tl.load(norm + latent, mask=there, other=0.0), tl.load(error + latent, mask=there, other=0.0)
    reach = a[:, None] * norms[None, :] + c[:, None] * errors[None, :] + (rounding * tl.abs(at) + absolute)
    return row[:, None], latent[None, :], at, reach, here[:, None] & there[None, :]


@triton.jit
def append(
    x, W, b_enc, row_a, row_c, norm, error, cut, go, key, approx, margin, count, n_rows, width, d, n_exempt, capacity, rounding, absolute,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Append (row * width + latent, approximation, margin) of every pair that can reach the number at `cut` (latents below
    n_exempt: 0); NaN is one of them. `count` goes on counting beyond the capacity, but nothing is stored there. The order is any.

    go: where there is a 0, nothing is done.
    """
    if tl.load(go) != 0:
        row, latent, at, reach, exists = _screened(
            x, W, b_enc, row_a, row_c, norm, error, n_rows, width, d, n_exempt, rounding, absolute, ROWS, LATENTS, DEPTH, TOGETHER
        )
        found = exists & ~(at + reach < tl.where(latent < n_exempt, 0.0, tl.load(cut)))
        # One pair in a thousand is found: single increments cost less than sums over the tile.
        place = tl.atomic_add(count + tl.zeros([ROWS, LATENTS], tl.int32), 1, mask=found, sem="relaxed")
        stored = found & (place < capacity)
        kind = key.dtype.element_ty
        tl.store(key + place, row.to(kind) * width + latent.to(kind), mask=stored)
        tl.store(approx + place, at, mask=stored)
        tl.store(margin + place, reach, mask=stored)


@triton.jit
def count_sure(
    x, W, b_enc, row_a, row_c, norm, error, go, counts, n_rows, width, d, n_exempt, rounding, absolute,
    SHIFT: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """counts[digit] of all pairs' approximation - margin, where positive: the bits from SHIFT on. Latents below n_exempt do not count."""
    if tl.load(go) != 0:
        row, latent, at, reach, exists = _screened(
            x, W, b_enc, row_a, row_c, norm, error, n_rows, width, d, n_exempt, rounding, absolute, ROWS, LATENTS, DEPTH, TOGETHER
        )
        sure = at - reach
        counted = exists & (sure > 0) & (latent >= n_exempt)
        digit = tl.where(counted, sure.to(tl.int32, bitcast=True) >> SHIFT, 0)
        size: tl.constexpr = ROWS * LATENTS
        found = tl.histogram(tl.reshape(digit, [size]), DIGITS, mask=tl.reshape(counted, [size]))
        tl.atomic_add(counts + tl.arange(0, DIGITS), found, mask=found > 0, sem="relaxed")
