"""CriticalKV's two-stage selection: which positions stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..budget import exact_share
from .cpu import projected_norm as cpu_norm
from .cpu import select as cpu
from .projected_norm import UnmadeNorm, kept_root, made_norm
from .window_attention import window_of


def select(
    base: Tensor,
    norm: Tensor | UnmadeNorm | None,
    budget: Any,
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
    real: Tensor | None = None,
    row_budgets: Tensor | None = None,
    triton: bool = False,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.select`, ``budget`` int or SymInt.

    Args:
        base: ``[B, Hkv, K]`` float32 attention scores; what they say of the window is not read.
        norm: ``[B, Hkv, K]`` float32 projected norms, or None for attention alone. A norm that
            is not made yet is made where it can decide: what comes out is the same.
        budget: entries to keep, at most K.
        real: ``[B, K]`` bool, False at pads; None for no pads.
        row_budgets: ``[B]`` int64, entries that each row keeps of its real ones, at most
            ``budget``; None for ``budget``.
        triton: whether the device has Triton's kernels.

    Returns:
        ``[B, Hkv, budget]`` int64, ascending: the window by construction, then stage 1 by
        attention, then stage 2 by ``(attention + epsilon) * norm``. Of equal scores the later
        position stays, on every device. NaN counts as the lowest score. A row that keeps fewer has
        them in its last slots, and position 0 before; at a budget of K all stay where they are.
    """
    # As a fraction: a float product could land on the wrong side of floor(ratio * budget).
    share = exact_share(first_stage_ratio)
    ratio = [share.numerator, share.denominator]
    options = (budget, window_size, ratio, epsilon, real, row_budgets)
    if isinstance(norm, UnmadeNorm) and norm.norm != "value" and not triton:
        operands = (norm.value, norm.weight, norm.in_out, norm.heads, norm.norm == "l2")
        return torch.ops.ckv_compile.select_by_norm(base, *operands, *options)
    made = norm.made() if isinstance(norm, UnmadeNorm) else norm
    if not triton:
        return torch.ops.ckv_compile.select(base, made, *options)
    from .gpu import select as gpu

    states = None
    if real is not None:
        _, prefix = window_of(torch.arange(base.shape[2], device=base.device), window_size, real)
        states = torch.where(prefix[:, 0], 1, 2).masked_fill(~real, 0).to(torch.int8)
        if row_budgets is None:
            row_budgets = real.new_full(real.shape[:1], budget, dtype=torch.int64)
    base, made = base.contiguous(), None if made is None else made.contiguous()
    return gpu.select(base, made, states, row_budgets, budget, window_size, ratio, epsilon)


def _selected(
    base: Tensor,
    norm: Tensor | None,
    budget: int,
    window_size: int,
    ratio: list[int],
    epsilon: float,
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> Tensor:
    if budget == base.shape[2]:
        return torch.arange(budget, device=base.device).expand(base.shape).contiguous()
    scores = None if norm is None else (base + epsilon) * norm
    if row_budgets is not None:
        row_budgets = row_budgets.clamp(max=budget)
    options = (budget, window_size, ratio, real, row_budgets)
    return (cpu.choose if cpu.takes(base) else _chosen)(base, scores, *options)


# An op of ours, opaque to the compiler: its top-k are library calls in any case, and traced they
# are thirty nodes in each layer, with guards on the length, for nothing to fuse.
_select = torch.library.custom_op("ckv_compile::select", _selected, mutates_args=())


@torch.library.custom_op("ckv_compile::select_by_norm", mutates_args=())
def _select_by_norm(
    base: Tensor,
    value: Tensor,
    weight: Tensor,
    in_out: bool,
    heads: int,
    quadratic: bool,
    budget: int,
    window_size: int,
    ratio: list[int],
    epsilon: float,
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> Tensor:
    options = (budget, window_size, ratio, epsilon, real, row_budgets)
    if budget == base.shape[2]:
        return _selected(base, None, *options)
    if not quadratic and cpu_norm.takes(value, weight):
        root = kept_root(weight, in_out, heads)
        return cpu_norm.select_bounded(base, value, weight, in_out, heads, root, *options)[0]
    return _selected(base, made_norm(value, weight, in_out, heads, quadratic), *options)


def _chosen(
    base: Tensor,
    scores: Tensor | None,
    budget: int,
    window_size: int,
    ratio: list[int],
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> Tensor:
    batch, _, kv_len = base.shape
    positions = torch.arange(kv_len, device=base.device)
    if real is None:
        real = torch.ones(1, kv_len, dtype=torch.bool, device=base.device).expand(batch, -1)
    if row_budgets is None:
        row_budgets = torch.full((batch,), budget, device=base.device)
    count = real.sum(-1, keepdim=True)
    kept = in_window(real, window_size)[:, None]  # [B, 1, K]
    real, row_budgets = real[:, None], row_budgets[:, None]
    if scores is not None:
        first = (ratio[0] * row_budgets // ratio[1]).clamp(min=window_size)
        first = first.minimum(count).expand(base.shape[:2])
        kept = best(sort_keys(base, kept, real, positions), first)
    keys = sort_keys(base if scores is None else scores, kept, real, positions)
    chosen = keys.topk(budget, dim=-1).indices
    unused = torch.arange(budget, device=base.device) >= row_budgets[..., None]
    return chosen.masked_fill(unused, -1).sort(dim=-1).values.clamp(min=0)


@_select.register_fake
def _(
    base: Tensor,
    norm: Tensor | None,
    budget: int,
    window_size: int,
    ratio: list[int],
    epsilon: float,
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> Tensor:
    return base.new_empty((base.shape[0], base.shape[1], budget), dtype=torch.int64)


@_select_by_norm.register_fake
def _(
    base: Tensor,
    value: Tensor,
    weight: Tensor,
    in_out: bool,
    heads: int,
    quadratic: bool,
    budget: int,
    *options: Any,
) -> Tensor:
    return base.new_empty((base.shape[0], base.shape[1], budget), dtype=torch.int64)


def in_window(real: Tensor, window_size: int) -> Tensor:
    """The last ``window_size`` real tokens of each row of ``[B, K]``, as bool."""
    return real & (real.cumsum(-1) > real.sum(-1, keepdim=True) - window_size)


def best(keys: Tensor, count: Tensor) -> Tensor:
    """Which of the distinct ``keys`` ``[.., N]`` are the ``count`` ``[..]`` largest, as bool."""
    most = min(int(count.max()), keys.shape[-1])
    if not most:
        return torch.zeros_like(keys, dtype=torch.bool)
    ordered = keys.topk(most, dim=-1).values
    last = ordered.gather(-1, (count - 1).clamp(min=0)[..., None])
    return (keys >= last) & (count > 0)[..., None]


def sort_keys(scores: Tensor, first: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """Distinct int64 keys: ``first`` before all, then by score, pads last; of equals the later.

    The high half is the float's bit pattern, which orders like the float once negative numbers are
    flipped; the low half is the position. Any top-k of them is the same on every device.
    """
    low, high = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    finite = scores.nan_to_num(nan=low, posinf=high, neginf=low) + 0.0  # + 0.0 makes -0.0 a 0.0
    bits = finite.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = torch.where(first, 0x7FFFFFFF, ordered)
    ordered = torch.where(real, ordered, -0x80000000)
    return ordered * (1 << 32) + positions
