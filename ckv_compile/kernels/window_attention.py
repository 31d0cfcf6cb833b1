"""Attention of the observation window on every key: SnapKV's score."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.window_attention`, traceable.

    Args:
        query: ``[B, H, Q, D]``, any float dtype.
        key: ``[B, Hkv, K, D]``; the queries are those of the last ``Q`` keys, all in a prefill.
            Where fewer than ``window_size`` are there, the last of the window score alone.
        scale: SDPA's scale, None for ``1/sqrt(D)``.
        softcap: logits are ``softcap * tanh(logits / softcap)`` (Gemma 2), None for none.
        real: ``[B, K]`` bool, False at pads; None for no pads.
        bias: ``[B or 1, H or 1, Q or 1, K or 1]``, added to the logits after the cap (ALiBi, T5).
        sinks: ``[H]``, logits of one more key for each head, which has no value (GPT-OSS).

    Returns:
        ``[B, Hkv, K]`` float32; 0 where the window or a pad is. A row of at most ``window_size``
        tokens has no key to score; there the result only has to be finite.
    """
    batch, heads, _, _ = query.shape
    kv_len = key.shape[2]
    positions = torch.arange(kv_len, device=key.device)
    window, prefix = _window(positions, window_size, real)
    # Gathered by index, not sliced: query[:, :, -w:] would add a guard K >= w, hence one graph for
    # short prompts and one for long ones.
    first = kv_len - query.shape[2]  # the first query's position
    index = (window - first).clamp(min=0)[:, None, :, None].expand(batch, heads, -1, -1)
    logits = _logits(query, key, index, scale, softcap)
    if bias is not None:
        logits = logits + _rows_of(bias, index)
    hidden = positions > window[:, None, :, None]  # [1 or B, 1, W, K]
    if real is not None:
        hidden = hidden | ~real[:, None, None]
    attention = _softmax(logits.masked_fill(hidden, -math.inf), sinks)
    if first == 0:
        attention = attention.mean(2)  # [B, H, K]
    else:
        asked = (window >= first)[:, None, :, None]
        attention = (attention * asked).sum(2) / asked.sum(2).clamp(min=1)
    pooled = _pooled(attention.masked_fill(~prefix, -math.inf), kernel_size)
    return _mean_of_groups(pooled.masked_fill(~prefix, 0.0), key.shape[1])


def cross_attention(
    query: Tensor,
    key: Tensor,
    scale: Any,
    window_size: int,
    kernel_size: int,
    softcap: Any = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.cross_attention`, traceable.

    Args as of :func:`window_attention`; ``query`` and ``key`` are of different sequences.

    Returns:
        ``[B, Hkv, K]`` float32.
    """
    batch, heads, q_len, _ = query.shape
    steps = torch.arange(window_size, device=query.device) + (q_len - window_size)
    index = steps.clamp(min=0)[None, None, :, None].expand(batch, heads, -1, -1)
    attention = _softmax(_logits(query, key, index, scale, softcap), sinks)
    asked = (steps >= 0)[:, None]
    attention = (attention * asked).sum(2) / asked.sum(0)
    return _mean_of_groups(_pooled(attention, kernel_size), key.shape[1])


def _logits(query: Tensor, key: Tensor, index: Tensor, scale: Any, softcap: Any) -> Tensor:
    """Logits ``[B, H, W, K]`` of the queries at ``index`` ``[B, H, W, 1]``."""
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    rows = query.gather(2, index.expand(-1, -1, -1, head_dim)).float() * scale  # [B, H, W, D]
    rows = rows.reshape(batch, kv_heads, -1, head_dim)
    logits = rows @ key.float().transpose(-1, -2)  # [B, Hkv, G*W, K]
    logits = logits.reshape(batch, heads, -1, kv_len)
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _pooled(attention: Tensor, kernel_size: int) -> Tensor:
    """The largest of ``kernel_size`` neighbours, ``[B, H, K]``."""
    # max_pool1d specialises a symbolic length; the two-dimensional op does not. It pads with -inf.
    pooled = F.max_pool2d(
        attention[:, :, None], (1, kernel_size), stride=1, padding=(0, kernel_size // 2)
    )
    return pooled.reshape(attention.shape)


def _mean_of_groups(scores: Tensor, kv_heads: int) -> Tensor:
    batch, _, kv_len = scores.shape
    return scores.reshape(batch, kv_heads, -1, kv_len).mean(2)


def _window(positions: Tensor, window_size: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _rows_of(bias: Tensor, index: Tensor) -> Tensor:
    """The window's rows of a bias, ``index`` ``[B, H, W, 1]``."""
    if bias.shape[2] == 1:
        return bias.float()
    batch, heads = index.shape[:2]
    index = index.expand(-1, -1, -1, bias.shape[3])
    return bias.expand(batch, heads, -1, -1).gather(2, index).float()


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and the sinks, the keys' part.

    The sum is a product with ones: a generated C++ sum changes its form above 4,096 terms, which
    would guard on K and cost a second graph for long prompts.
    """
    largest = logits.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float()[:, None, None]
        largest = largest.maximum(sinks)
    weights = (logits - largest).exp()
    total = weights @ weights.new_ones(weights.shape[-1], 1)
    return weights / (total if sinks is None else total + (sinks - largest).exp())
