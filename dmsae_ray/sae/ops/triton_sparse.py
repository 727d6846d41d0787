"""Triton kernels over kept (row, latent) pairs. No atomics but for a count: every sum has a fixed order.

Pairs are sorted by row, then latent; a list may end in padding, whose row is the number of rows. All matrices are
contiguous, float32; d is a row's length. `torch_ops.TorchPairs` says what each kernel computes.

One program adds up all rows of a bag, however many: a row of large norm has thousands of pairs, a latent that is always
on has a pair with every row. So it asks memory for LONG rows at a time while there are so many, then for SHORT ones;
the order of sums is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sampled(
    a,
    W,
    bias,
    row,
    latent,
    approx,
    margin,
    bound,
    value,
    wrong,
    n,
    n_rows,
    n_exempt,
    d,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """value = <a[row], W[latent]> + bias[latent]; BLOCK sums run side by side and are added at the end.

    This order of sums is what defines a pair's value on this device. With `approx` (None: all pairs are wanted) pairs
    that cannot reach the number at `bound` (latents below n_exempt: 0) get -1, as padding does, and `wrong` counts
    values beyond their margin.
    """
    at = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    r = tl.load(row + at, mask=at < n, other=n_rows)
    wanted = r < n_rows
    j = tl.load(latent + at, mask=wanted, other=0)
    if approx is not None:
        near = tl.load(approx + at, mask=wanted, other=0.0)
        reach = tl.load(margin + at, mask=wanted, other=0.0)
        wanted = wanted & ~(near + reach < tl.where(j < n_exempt, 0.0, tl.load(bound)))
    left, right = a + r.to(tl.int64)[:, None] * d, W + j.to(tl.int64)[:, None] * d
    sums = tl.zeros([PAIRS, BLOCK], tl.float32)
    end = d * tl.max(wanted.to(tl.int32), axis=0)
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = wanted[:, None] & (column < d)
        sums += tl.load(left + column, mask=inside, other=0.0) * tl.load(right + column, mask=inside, other=0.0)
    result = tl.sum(sums, axis=1)
    if bias is not None:
        result += tl.load(bias + j, mask=wanted, other=0.0)
    tl.store(value + at, tl.where(wanted, result, -1.0), mask=at < n)
    if approx is not None:
        off = tl.sum((wanted & (tl.abs(result - near) > reach)).to(tl.int32), axis=0)
        if off > 0:
            tl.atomic_add(wrong, off)


@triton.jit
def _add_rows(total, W_dec, latent, value, i, last, d, at, N: tl.constexpr):
    """total + value * W_dec[latent] of pairs i, i + 1, ..., N of them, before `last`."""
    for n in tl.static_range(N):
        there = i + n < last
        j = tl.load(latent + i + n, mask=there, other=0).to(tl.int64)
        factor = tl.load(value + i + n, mask=there, other=0.0)
        total += factor * tl.load(W_dec + j * d + at, mask=at < tl.where(there, d, 0), other=0.0)
    return total


@triton.jit
def decode(
    x,
    b_dec,
    W_dec,
    bag_start,
    latent,
    value,
    S,
    squares,
    d,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
):
    """S[row, g] = sum over h >= g of row's error with prefix h, and `squares` of the errors by row and block of
    columns.

    A program has one row and BLOCK columns. bag_start[row * G + g] is the first pair of that row and group.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    error = tl.load(b_dec + at, mask=inside, other=0.0) - tl.load(x + row * d + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float64)
    first = tl.load(bag_start + row * G)
    for g in range(G):
        last = tl.load(bag_start + row * G + g + 1)
        whole = first + (last - first) // LONG * LONG
        for i in range(first, whole, LONG):
            error = _add_rows(error, W_dec, latent, value, i, whole, d, at, LONG)
        for i in range(whole, last, SHORT):
            error = _add_rows(error, W_dec, latent, value, i, last, d, at, SHORT)
        tl.store(S + (row * G + g) * d + at, error, mask=inside)
        total += error.to(tl.float64) * error.to(tl.float64)
        first = last
    tl.store(squares + row * tl.num_programs(1) + block, tl.sum(total, axis=0))
    after = tl.zeros([BLOCK], tl.float32)
    for back in range(G):
        place = S + (row * G + G - 1 - back) * d + at
        after += tl.load(place, mask=inside, other=0.0)
        tl.store(place, after, mask=inside)


@triton.jit
def _add_pairs(
    decoder,
    encoder,
    bias,
    S,
    centred,
    order,
    row,
    value,
    gradient,
    scale,
    group,
    i,
    last,
    d,
    columns,
    at,
    G: tl.constexpr,
    N: tl.constexpr,
):
    """The three sums of one latent's gradients with its pairs i, i + 1, ..., N of them, before `last`."""
    for n in tl.static_range(N):
        there = i + n < last
        pair = tl.load(order + i + n, mask=there, other=0)
        r = tl.load(row + pair, mask=there, other=0).to(tl.int64)
        by_value = scale * tl.load(value + pair, mask=there, other=0.0)
        by_gradient = scale * tl.load(gradient + pair, mask=there, other=0.0)
        decoder += by_value * tl.load(S + (r * G + group) * d + at, mask=at < tl.where(there, d, 0), other=0.0)
        encoder += by_gradient * tl.load(centred + r * d + at, mask=at < tl.where(there, columns, 0), other=0.0)
        bias += by_gradient
    return decoder, encoder, bias


@triton.jit
def weight_gradients(
    S,
    centred,
    start,
    order,
    row,
    value,
    gradient,
    group_end,
    W_enc,
    b_enc,
    W_dec,
    scale,
    n_frozen,
    d,
    G: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
):
    """All gradients of one latent, BLOCK columns of them: scale * sums over its pairs, which are order[start[latent]],
    ...

    ADD: they are added to what is there.
    """
    j, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    group = 0
    for g in tl.static_range(G):
        group += (j >= tl.load(group_end + g)).to(tl.int32)
    columns = tl.where(j >= n_frozen, d, 0)  # of the encoder's gradient
    decoder, encoder, bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
    first, last = tl.load(start + j), tl.load(start + j + 1)
    whole = first + (last - first) // LONG * LONG
    for i in range(first, whole, LONG):
        decoder, encoder, bias = _add_pairs(
            decoder,
            encoder,
            bias,
            S,
            centred,
            order,
            row,
            value,
            gradient,
            scale,
            group,
            i,
            whole,
            d,
            columns,
            at,
            G,
            LONG,
        )
    for i in range(whole, last, SHORT):
        decoder, encoder, bias = _add_pairs(
            decoder,
            encoder,
            bias,
            S,
            centred,
            order,
            row,
            value,
            gradient,
            scale,
            group,
            i,
            last,
            d,
            columns,
            at,
            G,
            SHORT,
        )
    if ADD:
        decoder += tl.load(W_dec + j * d + at, mask=inside, other=0.0)
        encoder += tl.load(W_enc + (j - n_frozen) * d + at, mask=at < columns, other=0.0)
        bias += tl.load(b_enc + j)
    tl.store(W_dec + j * d + at, decoder, mask=inside)
    tl.store(W_enc + (j - n_frozen) * d + at, encoder, mask=at < columns)
    if block == 0:
        tl.store(b_enc + j, bias)
