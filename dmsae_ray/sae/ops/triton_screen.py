"""The fused screen: a product whose epilogue hands on the few pairs that may be kept, so that batch x width is never
written.

x [B, D] and W [F, D] are contiguous, both bf16 or both float32; sums are float32. See `screen.py` for margins,
`gate_on_device.py` for how the kernels are used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(
    x, W, n_rows, width, d, ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr
):
    """First row, first latent and the product of one tile.

    Tiles are dealt so that TOGETHER blocks of rows read the same latents while those are in the cache.
    """
    row_tiles, latent_tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(width, LATENTS)
    tile = tl.program_id(0)
    band = tile // (TOGETHER * latent_tiles)
    high = tl.minimum(row_tiles - band * TOGETHER, TOGETHER)
    inner = tile % (TOGETHER * latent_tiles)
    first_row, first_latent = (band * TOGETHER + inner % high) * ROWS, (inner // high) * LATENTS
    row, latent = first_row + tl.arange(0, ROWS), first_latent + tl.arange(0, LATENTS)
    column = tl.arange(0, DEPTH)
    left = x + row.to(tl.int64)[:, None] * d + column[None, :]
    right = W + latent.to(tl.int64)[None, :] * d + column[:, None]
    here, there = (row < n_rows)[:, None], (latent < width)[None, :]
    product = tl.zeros([ROWS, LATENTS], tl.float32)
    for start in range(0, d, DEPTH):
        a = tl.load(left + start, mask=here & (start + column < d)[None, :], other=0.0)
        b = tl.load(right + start, mask=there & (start + column < d)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
    return first_row, first_latent, product


@triton.jit
def _approximate(product, row, latent, b_enc, row_a, row_c, norm, error, n_rows, width, rounding, absolute):
    """Approximate values, what they can be off, and which of them exist, for columns `latent` of a product."""
    here, there = row < n_rows, latent < width
    a, c = tl.load(row_a + row, mask=here, other=0.0), tl.load(row_c + row, mask=here, other=0.0)
    norms, errors = tl.load(norm + latent, mask=there, other=0.0), tl.load(error + latent, mask=there, other=0.0)
    at = product + tl.load(b_enc + latent, mask=there, other=0.0)[None, :]
    reach = a[:, None] * norms[None, :] + c[:, None] * errors[None, :] + (rounding * tl.abs(at) + absolute)
    return at, reach, here[:, None] & there[None, :]


@triton.jit
def _halves(product, ROWS: tl.constexpr, LATENTS: tl.constexpr):
    """Left and right half of the columns."""
    return tl.split(tl.permute(tl.reshape(product, [ROWS, 2, LATENTS // 2]), [0, 2, 1]))


@triton.jit
def _parts(product, ROWS: tl.constexpr, LATENTS: tl.constexpr):
    """The columns in eight parts: what an epilogue holds beside the product has to fit the registers."""
    left, right = _halves(product, ROWS, LATENTS)
    a, b = _halves(left, ROWS, LATENTS // 2)
    c, d = _halves(right, ROWS, LATENTS // 2)
    QUARTER: tl.constexpr = LATENTS // 4
    return _halves(a, ROWS, QUARTER) + _halves(b, ROWS, QUARTER) + _halves(c, ROWS, QUARTER) + _halves(d, ROWS, QUARTER)


@triton.jit
def _append_part(
    product,
    row,
    first_latent,
    b_enc,
    row_a,
    row_c,
    norm,
    error,
    cut,
    key,
    approx,
    count,
    n_rows,
    width,
    n_exempt,
    capacity,
    rounding,
    absolute,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
):
    latent = first_latent + tl.arange(0, LATENTS)
    at, reach, exists = _approximate(
        product, row, latent, b_enc, row_a, row_c, norm, error, n_rows, width, rounding, absolute
    )
    found = exists & ~(at + reach < tl.where(latent < n_exempt, 0.0, tl.load(cut))[None, :])
    # One pair in a thousand is found: single increments cost less than sums over the tile.
    place = tl.atomic_add(count + tl.zeros([ROWS, LATENTS], tl.int32), 1, mask=found, sem="relaxed")
    stored = found & (place < capacity)
    kind = key.dtype.element_ty
    tl.store(key + place, row.to(kind)[:, None] * width + latent.to(kind)[None, :], mask=stored)
    tl.store(approx + place, at, mask=stored)


@triton.jit
def append(
    x,
    W,
    b_enc,
    row_a,
    row_c,
    norm,
    error,
    cut,
    go,
    key,
    approx,
    count,
    n_rows,
    width,
    d,
    n_exempt,
    capacity,
    rounding,
    absolute,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Append (row * width + latent, approximation) of every pair that can reach the number at `cut` (latents below
    n_exempt: 0); NaN is one of them. `count` goes on counting beyond the capacity, but nothing is stored there. The
    order is any.

    go: where there is a 0, nothing is done.
    """
    if tl.load(go) != 0:
        first_row, first_latent, product = _product(x, W, n_rows, width, d, ROWS, LATENTS, DEPTH, TOGETHER)
        row = first_row + tl.arange(0, ROWS)
        parts = _parts(product, ROWS, LATENTS)
        for n in tl.static_range(8):
            _append_part(
                parts[n],
                row,
                first_latent + n * (LATENTS // 8),
                b_enc,
                row_a,
                row_c,
                norm,
                error,
                cut,
                key,
                approx,
                count,
                n_rows,
                width,
                n_exempt,
                capacity,
                rounding,
                absolute,
                ROWS,
                LATENTS // 8,
            )


@triton.jit
def count_sure(
    x,
    W,
    b_enc,
    row_a,
    row_c,
    norm,
    error,
    go,
    counts,
    n_rows,
    width,
    d,
    n_exempt,
    rounding,
    absolute,
    SHIFT: tl.constexpr,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """counts[digit] of all pairs' approximation - margin, where positive: the bits from SHIFT on. Latents below
    n_exempt do not count.
    """
    if tl.load(go) != 0:
        first_row, first_latent, product = _product(x, W, n_rows, width, d, ROWS, LATENTS, DEPTH, TOGETHER)
        row = first_row + tl.arange(0, ROWS)
        parts = _parts(product, ROWS, LATENTS)
        for n in tl.static_range(8):
            latent = first_latent + n * (LATENTS // 8) + tl.arange(0, LATENTS // 8)
            at, reach, exists = _approximate(
                parts[n], row, latent, b_enc, row_a, row_c, norm, error, n_rows, width, rounding, absolute
            )
            sure = at - reach
            counted = exists & (sure > 0) & (latent >= n_exempt)[None, :]
            digit = tl.where(counted, sure.to(tl.int32, bitcast=True) >> SHIFT, 0)
            found = tl.histogram(
                tl.reshape(digit, [ROWS * (LATENTS // 8)]), DIGITS, mask=tl.reshape(counted, [ROWS * (LATENTS // 8)])
            )
            tl.atomic_add(counts + tl.arange(0, DIGITS), found, mask=found > 0, sem="relaxed")
