"""Triton kernels over the rows of a matrix: one program holds one row, and every sum within it has a fixed order.

All matrices are contiguous, float32; d is a row's length, BLOCK the next power of two. Sums of squares are taken in
float64, so that none overflows or is lost. `torch_ops.TorchPairs` says what each kernel computes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _norm(value):
    return tl.sqrt(tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=0))


@triton.jit
def _put_rounded(value, row, at, inside, low, norm, error, d):
    """bf16 copy of one row (low, as int16; None: none wanted), its norm, and the norm of what rounding took away."""
    tl.store(norm + row, _norm(value).to(tl.float32))
    if low is None:
        tl.store(error + row, 0.0)
    else:
        bits = value.to(tl.int32, bitcast=True)
        # To the nearest, ties to even; NaN stays NaN. By hand, because the interpreter's conversion truncates.
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest)
        tl.store(low + row * d + at, high.to(tl.int16), mask=inside)
        tl.store(error + row, _norm(value - (high << 16).to(tl.float32, bitcast=True)).to(tl.float32))


@triton.jit
def prepare_rows(x, b_dec, centred, low, norm, error, d, BLOCK: tl.constexpr):
    """centred = x - b_dec (both None: rows are x as they stand), and its rounding."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < d
    value = tl.load(x + row * d + at, mask=inside, other=0.0)
    if b_dec is not None:
        value -= tl.load(b_dec + at, mask=inside, other=0.0)
        tl.store(centred + row * d + at, value, mask=inside)
    _put_rounded(value, row, at, inside, low, norm, error, d)


@triton.jit
def gradient_squares(gradient, W, parallel, squares, d, BLOCK: tl.constexpr):
    """The gradient's component along each row of W, as a factor of W, and the sum of squares of the rest (W None: of
    all).
    """
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < d
    g = tl.load(gradient + row * d + at, mask=inside, other=0.0)
    if W is not None:
        w = tl.load(W + row * d + at, mask=inside, other=0.0)
        length = _norm(w) + 1e-6
        factor = (tl.sum(g.to(tl.float64) * w.to(tl.float64), axis=0) / (length * length)).to(tl.float32)
        tl.store(parallel + row, factor)
        g -= factor * w
    tl.store(squares + row, tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=0))


@triton.jit
def adam(
    W,
    gradient,
    mean,
    square,
    parallel,
    clip,
    go,
    low,
    norm,
    error,
    step_size,
    correction,
    total,
    d,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    UNIT_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole update of a row in one pass over weights, gradient and state.

    parallel * W is taken out of the gradient (None: nothing), then it is multiplied by the number at `clip`. go: where
    there is a 0, nothing is changed. UNIT_EPS: the new row is divided by its norm plus this (None: it is not). norm
    None: no rounding.
    total: numbers in all rows, which a vector cut into rows of BLOCK does not fill.
    """
    if tl.load(go) != 0:
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        place = row * d + at
        inside = (at < d) & (place < total)
        w = tl.load(W + place, mask=inside, other=0.0)
        g = tl.load(gradient + place, mask=inside, other=0.0)
        if parallel is not None:
            g -= tl.load(parallel + row) * w
        g *= tl.load(clip)
        m = BETA1 * tl.load(mean + place, mask=inside, other=0.0) + (1 - BETA1) * g
        v = BETA2 * tl.load(square + place, mask=inside, other=0.0) + (1 - BETA2) * g * g
        tl.store(mean + place, m, mask=inside)
        tl.store(square + place, v, mask=inside)
        w -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * correction + EPS)
        if UNIT_EPS is not None:
            w = tl.div_rn(w, tl.broadcast_to(_norm(w).to(tl.float32) + UNIT_EPS, [BLOCK]))
        tl.store(W + place, w, mask=inside)
        if norm is not None:
            _put_rounded(w, row, at, inside, low, norm, error, d)
