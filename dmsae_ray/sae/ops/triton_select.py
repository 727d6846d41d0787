"""Triton kernels of a radix select whose state stays on the device: no pass waits for the host.

Positive floats are ordered like their bits read as integers. state: int64 [leading bits found, rank wanted among those
that share them (1: largest), 1 if there are so many positive values].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_digits(
    value,
    counts,
    state,
    n,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to counts how many positive values whose bits above the digit are those in `state` (FIRST: all) have which
    digit.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(value + at, mask=at < n, other=0.0)
    bits = number.to(tl.int32, bitcast=True)
    counted = number > 0
    if not FIRST:
        counted = counted & ((bits >> (SHIFT + BITS)) == tl.load(state).to(tl.int32))
    digits: tl.constexpr = 1 << BITS
    digit = tl.where(counted, (bits >> SHIFT) & (digits - 1), 0)
    found = tl.histogram(digit, digits, mask=counted)
    tl.atomic_add(counts + tl.arange(0, digits), found, mask=found > 0, sem="relaxed")


@triton.jit
def choose_digit(counts, state, BITS: tl.constexpr):
    """Take one digit into the state, and set the counts back to 0."""
    at = tl.arange(0, 1 << BITS)
    count = tl.load(counts + at).to(tl.int64)
    at_least = tl.cumsum(count, axis=0, reverse=True)
    prefix, left = tl.load(state), tl.load(state + 1)
    digit = tl.sum((at_least >= left).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(at == digit, at_least - count, 0), axis=0)
    tl.store(counts + at, tl.zeros_like(at))
    tl.debug_barrier()  # all have read the state
    tl.store(state, (prefix << BITS) | tl.maximum(digit, 0))
    tl.store(state + 1, left - above)
    if digit < 0:
        tl.store(state + 2, 0)
