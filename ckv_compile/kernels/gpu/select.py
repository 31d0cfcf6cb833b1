"""Two-stage selection on a GPU: a radix select by bytes instead of sorts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _ordered(scores):
    """uint32 that order like the floats; NaN is the lowest, infinities are the largest numbers."""
    lowest = -3.4028234663852886e38
    finite = tl.where(scores == scores, scores, lowest)
    finite = tl.minimum(tl.maximum(finite, lowest), -lowest) + 0.0  # + 0.0 makes -0.0 a 0.0
    bits = finite.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _sort_keys(
    base, norm, states, row, batch, at, kv_len, window_start, epsilon, threshold, tie_from,
    second: tl.constexpr,
):  # fmt: skip
    """Keys of positions ``at``: 0 of pads, all ones of what stays by construction or by stage 1.

    In the first stage the window stays, in the second (``second``) what the first one kept.
    """
    inside = at < kv_len
    score = tl.load(base + row * kv_len + at, mask=inside, other=0.0)
    if states is None:
        pad, window = at < 0, at >= window_start
    else:
        state = tl.load(states + batch * kv_len + at, mask=inside, other=0)
        pad, window = state == 0, state == 2
    keys = _ordered(score)
    keys = tl.where(window, 0xFFFFFFFF, keys)
    keys = tl.where(pad, 0, keys)
    if second:
        kept = (keys > threshold) | ((keys == threshold) & (at >= tie_from))
        factor = tl.load(norm + row * kv_len + at, mask=inside, other=0.0)
        keys = _ordered((score + tl.cast(epsilon, tl.float32)) * factor)
        keys = tl.where(kept, 0xFFFFFFFF, keys)
        keys = tl.where(pad, 0, keys)
    return keys


@triton.jit
def _threshold(
    base, norm, states, row, batch, kv_len, window_start, epsilon, threshold, tie_from,
    count, second: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """The key ``t`` and the position ``p`` so that ``count`` have ``(key, position) >= (t, p)``."""
    digits = tl.arange(0, 256)
    found = tl.full((), 0, tl.uint32)
    ties = count
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, kv_len, block_k):
            at = start + tl.arange(0, block_k)
            keys = _sort_keys(
                base, norm, states, row, batch, at, kv_len, window_start, epsilon,
                threshold, tie_from, second,
            )  # fmt: skip
            same = at < kv_len
            if step > 0:
                same = same & ((keys >> (shift + 8)) == (found >> (shift + 8)))
            byte = ((keys >> shift) & 0xFF).to(tl.int32)
            histogram += tl.histogram(byte, 256, mask=same)
        above = tl.sum(histogram) - tl.cumsum(histogram)  # with a larger digit
        digit = tl.max(tl.where(above + histogram >= ties, digits, 0))
        ties -= tl.sum(tl.where(digits == digit, above, 0))
        equal = tl.sum(tl.where(digits == digit, histogram, 0))
        found = found | (digit.to(tl.uint32) << shift)
    # Of the `equal` keys that are the threshold the last `ties` stay.
    before, tie = 0, kv_len
    for start in range(0, kv_len, block_k):
        at = start + tl.arange(0, block_k)
        keys = _sort_keys(
            base, norm, states, row, batch, at, kv_len, window_start, epsilon,
            threshold, tie_from, second,
        )  # fmt: skip
        same = ((keys == found) & (at < kv_len)).to(tl.int32)
        number = before + tl.cumsum(same) - same
        stays = (same == 1) & (number >= equal - ties)
        tie = tl.minimum(tie, tl.min(tl.where(stays, at, kv_len)))
        before += tl.sum(same)
    return found, tie


@triton.jit
def select_kernel(
    base, norm, states, row_budgets, keep, heads, kv_len, budget, window_size, numerator,
    denominator, epsilon,
    two_stages: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Kept positions ``[B, Hkv, budget]``, ascending, in the last slots. One program for a row.

    ``states`` ``[B, K]`` int8 says what is pad, candidate and window.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    window_start = kv_len - window_size
    stays, candidates = budget, kv_len
    if states is not None:
        stays = tl.load(row_budgets + batch).to(tl.int32)
        # Where nothing is cut, nothing moves.
        stays = tl.where(budget == kv_len, kv_len, stays)
        candidates = 0
        for start in range(0, kv_len, block_k):
            at = start + tl.arange(0, block_k)
            state = tl.load(states + batch * kv_len + at, mask=at < kv_len, other=0)
            candidates += tl.sum((state != 0).to(tl.int32))
    threshold, tie = tl.full((), 0, tl.uint32), 0
    if two_stages:
        product = tl.full((), 0, tl.int64) + stays
        first = (product * numerator // denominator).to(tl.int32)
        first = tl.minimum(tl.maximum(first, window_size), candidates)
        threshold, tie = _threshold(
            base, norm, states, row, batch, kv_len, window_start, epsilon, threshold, tie,
            first, False, block_k,
        )  # fmt: skip
    last, last_tie = _threshold(
        base, norm, states, row, batch, kv_len, window_start, epsilon, threshold, tie,
        stays, two_stages, block_k,
    )  # fmt: skip
    slot = budget - stays
    out = keep + row * budget
    for start in range(0, slot, block_k):
        at = start + tl.arange(0, block_k)
        tl.store(out + at, tl.zeros((block_k,), tl.int64), mask=at < slot)
    for start in range(0, kv_len, block_k):
        at = start + tl.arange(0, block_k)
        keys = _sort_keys(
            base, norm, states, row, batch, at, kv_len, window_start, epsilon, threshold, tie,
            two_stages,
        )  # fmt: skip
        kept = ((keys > last) | ((keys == last) & (at >= last_tie))) & (at < kv_len)
        number = kept.to(tl.int32)
        tl.store(out + slot + tl.cumsum(number) - number, at.to(tl.int64), mask=kept)
        slot += tl.sum(number)


@triton_op("ckv_compile::select_triton", mutates_args={})
def select(
    base: Tensor,
    norm: Tensor | None,
    states: Tensor | None,
    row_budgets: Tensor | None,
    budget: int,
    window_size: int,
    ratio: list[int],
    epsilon: float,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.select.select`.

    Args:
        base, norm: ``[B, Hkv, K]`` float32, contiguous.
        states: ``[B, K]`` int8, 0 at pads, 2 in the window, else 1; None for no pads.
        row_budgets: ``[B]`` int64, None for no pads.
        ratio: of the first stage, numerator and denominator.
    """
    batch, heads, kv_len = base.shape
    keep = torch.empty(batch, heads, budget, dtype=torch.int64, device=base.device)
    wrap_triton(select_kernel)[(batch * heads,)](
        base, norm, states, row_budgets, keep, heads, kv_len, budget, window_size, *ratio, epsilon,
        two_stages=norm is not None, block_k=1024,
    )  # fmt: skip
    return keep
