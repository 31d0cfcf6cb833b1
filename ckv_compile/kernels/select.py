"""CriticalKV's two-stage selection: which positions stay."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


def select(
    base: Tensor,
    norm: Tensor | None,
    budget: Any,
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.select`, ``budget`` int or SymInt.

    Args:
        base: ``[B, Hkv, K]`` float32 attention scores; what they say of the window is not read.
        norm: ``[B, Hkv, K]`` float32 projected norms, or None for attention alone.
        budget: entries to keep, at most K.

    Returns:
        ``[B, Hkv, budget]`` int64, ascending: the window by construction, then stage 1 by
        attention, then stage 2 by ``(attention + epsilon) * norm``. Of equal scores the later
        position stays, on every device. NaN counts as the lowest score.
    """
    # floor(ratio * budget) in integers: a float product could land on the wrong side.
    ratio = Fraction(str(first_stage_ratio))
    first = ratio.numerator * budget // ratio.denominator
    return torch.ops.ckv_compile.select(base, norm, budget, first, window_size, epsilon)


# An op of ours, opaque to the compiler: its top-k are library calls in any case, and traced they
# are thirty nodes in each layer, with guards on the length, for nothing to fuse.
@torch.library.custom_op("ckv_compile::select", mutates_args=())
def _select(
    base: Tensor, norm: Tensor | None, budget: int, first: int, window_size: int, epsilon: float
) -> Tensor:
    kv_len = base.shape[2]
    positions = torch.arange(kv_len, device=base.device)
    chosen = positions >= kv_len - window_size
    scores = base
    if norm is not None:
        first = min(kv_len, max(first, window_size))
        keys = _sort_keys(base, chosen, positions)
        # Keys are distinct, so the threshold lets exactly `first` of them through.
        chosen = keys >= keys.topk(first, dim=-1).values[..., -1:]
        scores = (base + epsilon) * norm
    best = _sort_keys(scores, chosen, positions).topk(budget, dim=-1, sorted=False).indices
    return best.sort(dim=-1).values


@_select.register_fake
def _(
    base: Tensor, norm: Tensor | None, budget: int, first: int, window_size: int, epsilon: float
) -> Tensor:
    return base.new_empty((base.shape[0], base.shape[1], budget), dtype=torch.int64)


def _sort_keys(scores: Tensor, chosen: Tensor, positions: Tensor) -> Tensor:
    """Distinct int64 keys: the chosen first, then by score, of equals the later position.

    The high half is the float's bit pattern, which orders like the float once negative numbers are
    flipped; the low half is the position. Any top-k of them is the same on every device.
    """
    low, high = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    finite = scores.nan_to_num(nan=low, posinf=high, neginf=low) + 0.0  # + 0.0 makes -0.0 a 0.0
    bits = finite.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = torch.where(chosen, 0x7FFFFFFF, ordered)
    return ordered * (1 << 32) + positions
