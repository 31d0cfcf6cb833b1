"""Attention of the observation window on every key: SnapKV's score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import window_attention as cpu
from .projected_norm import mean_of_groups

# Of the logits of one block of keys: they stay in a core's L2 cache.
_BLOCK_BYTES = 1 << 20
_LOWEST = torch.finfo(torch.float32).min


def window_attention(
    query: Tensor,
    key: Tensor,
    scale: Any,
    window_size: int,
    kernel_size: int,
    softcap: Any = None,
    real: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    triton: bool = False,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.window_attention`, traceable.

    Args:
        query: ``[B, H, Q, D]``, any float dtype.
        key: ``[B, Hkv, K, D]``; the queries are those of the last ``Q`` keys, all in a prefill.
            Where fewer than ``window_size`` are there, the last of the window score alone.
        scale: SDPA's scale, None for ``1/sqrt(D)``.
        softcap: logits are ``softcap * tanh(logits / softcap)`` (Gemma 2), None for none.
        real: ``[B, K]`` bool, False at pads, which stand before or behind a row's tokens; None for
            no pads.
        bias: ``[B or 1, H or 1, Q or 1, K or 1]``, added to the logits after the cap (ALiBi, T5).
        sinks: ``[H]``, logits of one more key for each head, which has no value (GPT-OSS).
        triton: whether the device has Triton's kernels.

    Returns:
        ``[B, Hkv, K]`` float32; 0 where the window or a pad is. A row of at most ``window_size``
        tokens has no key to score; there the result only has to be finite.
    """
    operands = (query, key, scale, window_size, kernel_size, softcap, real, bias, sinks)
    return _dispatched(*operands, causal=True, triton=triton)


def cross_attention(
    query: Tensor,
    key: Tensor,
    scale: Any,
    window_size: int,
    kernel_size: int,
    softcap: Any = None,
    sinks: Tensor | None = None,
    triton: bool = False,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.cross_attention`, traceable.

    Args as of :func:`window_attention`; ``query`` and ``key`` are of different sequences.

    Returns:
        ``[B, Hkv, K]`` float32.
    """
    operands = (query, key, scale, window_size, kernel_size, softcap, None, None, sinks)
    return _dispatched(*operands, causal=False, triton=triton)


def _dispatched(
    query: Tensor, key: Tensor, scale: Any, *options: Any, causal: bool, triton: bool
) -> Any:
    """``causal``: a query sees no key behind its position; queries are those of the last keys."""
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if not triton:
        return torch.ops.ckv_compile.window_attention(query, key, scale, *options, causal)
    from .gpu.window_attention import summed_attention

    return _scores(summed_attention, query, key, *(scale, *options, causal))


# An op of ours, opaque to the compiler, which would write all logits [B, H, W, K] to memory, and
# make seven kernels in each layer of what is a hundredth of its work.
@torch.library.custom_op("ckv_compile::window_attention", mutates_args=())
def _on_cpu(
    query: Tensor,
    key: Tensor,
    scale: float,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
    real: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    if cpu.takes(query, key, bias):
        return cpu.scores(query, key, scale, window_size, kernel_size, softcap, real, sinks, causal)
    options = (scale, window_size, kernel_size, softcap, real, bias, sinks, causal)
    with torch.autocast(key.device.type, enabled=False):  # the caller's would round logits
        return _scores(_summed_attention, query, key, *options)


@_on_cpu.register_fake
def _(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _scores(
    summed_attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    scale: float,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
    real: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Mean, pool and mean of the groups: what is the same on every device."""
    q_len, (kv_heads, kv_len) = query.shape[2], key.shape[1:3]
    window, asked, prefix = _window(q_len, kv_len, window_size, real, causal, key.device)
    operands = (query, key, window, asked, scale, softcap, real, bias, sinks, causal)
    attention = summed_attention(*operands) / asked.sum(1).clamp(min=1)[:, None, None]
    if prefix is None:
        return mean_of_groups(_pooled(attention, kernel_size), kv_heads)
    pooled = _pooled(attention.masked_fill(~prefix, -math.inf), kernel_size)
    return mean_of_groups(pooled.masked_fill(~prefix, 0.0), kv_heads)


def _window(
    q_len: Any, kv_len: Any, window_size: int, real: Tensor | None, causal: bool, device: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions of the last queries ``[1 or B, W]``, which of them are there, and the keys that are
    scored, ``[1 or B, 1, K]``; None for all."""
    if causal:
        window, prefix = window_of(torch.arange(kv_len, device=device), window_size, real)
        return window, window >= kv_len - q_len, prefix
    steps = torch.arange(window_size, device=device) + (q_len - window_size)
    return steps.clamp(min=0)[None], (steps >= 0)[None], None


def _pooled(attention: Tensor, kernel_size: int) -> Tensor:
    """The largest of ``kernel_size`` neighbours, ``[B, H, K]``."""
    # max_pool1d specialises a symbolic length; the two-dimensional op does not. It pads with -inf.
    pooled = F.max_pool2d(
        attention[:, :, None], (1, kernel_size), stride=1, padding=(0, kernel_size // 2)
    )
    return pooled.reshape(attention.shape)


def window_of(positions: Tensor, window_size: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of the last queries ``[1 or B, W]``, and the keys before them ``[.., 1, K]``."""
    kv_len = positions.shape[0]
    steps = torch.arange(window_size, device=positions.device)
    if real is None:
        window = (steps + (kv_len - window_size)).clamp(min=0)[None]
        return window, (positions < kv_len - window_size)[None, None]
    ranks, count = real.cumsum(-1) - 1, real.sum(-1, keepdim=True)  # among the row's real tokens
    pads = (~real).cumsum(-1) - 1 + count
    by_rank = torch.empty_like(ranks).scatter(
        1, torch.where(real, ranks, pads), positions.expand(ranks.shape)
    )
    window = by_rank.gather(1, (steps + (count - window_size)).clamp(min=0))
    return window, (real & (ranks < count - window_size))[:, None]


def with_heads(bias: Tensor, heads: int) -> Tensor:
    """``[B or 1, H or 1, Q or 1, K or 1]``; three dimensions are ``[B*H or H or 1, Q, K]``."""
    if bias.dim() == 3 and bias.shape[0] != 1:
        return bias.reshape(-1, heads, *bias.shape[1:])
    return bias.reshape(*(1,) * (4 - bias.dim()), *bias.shape)


def _summed_attention(
    query: Tensor,
    key: Tensor,
    window: Tensor,
    asked: Tensor,
    scale: float,
    softcap: float | None,
    real: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention ``[B, H, K]`` summed over the queries at ``window`` ``[1 or B, W]`` that are asked.

    Only the logits of a block of keys exist at a time, and they are made twice.
    """
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    first = kv_len - q_len if causal else 0
    summed = query.new_empty((batch, heads, kv_len), dtype=torch.float32)
    step = max(_BLOCK_BYTES // (4 * heads * window.shape[1]), 64)
    blocks = [slice(start, start + step) for start in range(0, kv_len, step)]
    if bias is not None:
        bias = bias.expand(batch, heads, q_len, kv_len)
    buffer = query.new_empty(heads * window.shape[1] * step, dtype=torch.float32)
    for b in range(batch):
        at = window[b % window.shape[0]]
        seen_by_all = int(at.min())
        index = (at - first).clamp(min=0)
        rows = query[b].index_select(1, index).float() * scale  # [H, W, D]
        stacked = rows.reshape(kv_heads, -1, rows.shape[2])  # [Hkv, G*W, D]

        def logits(
            block: slice, b: int = b, at: Tensor = at, index: Tensor = index,
            stacked: Tensor = stacked, seen_by_all: int = seen_by_all,
        ) -> Tensor:  # fmt: skip
            keys = key[b, :, block].float().transpose(-1, -2)  # [Hkv, D, k]
            shape = (*stacked.shape[:2], keys.shape[2])
            out = torch.bmm(stacked, keys, out=buffer[: math.prod(shape)].view(shape))
            out = out.view(heads, -1, shape[2])
            if softcap is not None:
                out.div_(softcap).tanh_().mul_(softcap)
            if bias is not None:
                out += bias[b, :, :, block].index_select(1, index)
            if causal and block.stop > seen_by_all + 1:
                positions = torch.arange(block.start, block.start + shape[2], device=key.device)
                out.masked_fill_(positions > at[:, None], -math.inf)
            if real is not None:
                out.masked_fill_(~real[b, block], -math.inf)
            return out

        parts = []
        for block in blocks:
            out = logits(block)
            most = out.amax(-1, keepdim=True).clamp_(min=_LOWEST)  # of who sees none: -inf
            parts.append(out.sub_(most).exp_().sum(-1).log_().add_(most[..., 0]))
        lse = torch.stack(parts).logsumexp(0)  # [H, W]
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float()[:, None])
        # exp(-inf): who is not asked, or sees nothing, adds nothing.
        lse = torch.where(asked[b % len(asked)] & (lse != -math.inf), lse, math.inf)
        for block in blocks:
            summed[b, :, block] = logits(block).sub_(lse[..., None]).exp_().sum(1)
    return summed
