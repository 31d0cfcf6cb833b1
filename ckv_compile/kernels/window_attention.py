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
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.window_attention`, traceable.

    Args:
        query: ``[B, H, Q, D]``, any float dtype.
        key: ``[B, Hkv, K, D]`` with ``K == Q``: the causal prefill of a fresh cache.
        scale: SDPA's scale, None for ``1/sqrt(D)``.
        softcap: logits are ``softcap * tanh(logits / softcap)`` (Gemma 2), None for none.

    Returns:
        ``[B, Hkv, K]`` float32; 0 where the window is. For ``K <= window_size`` there is no key to
        score and the result only has to be finite.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    positions = torch.arange(kv_len, device=key.device)
    # Gathered by index, not sliced: query[:, :, -w:] would add a guard K >= w, hence one graph for
    # short prompts and one for long ones.
    window = (torch.arange(window_size, device=key.device) + (kv_len - window_size)).clamp(min=0)
    rows = query.index_select(2, window).float() * scale  # [B, H, W, D]
    rows = rows.reshape(batch, kv_heads, groups * window_size, head_dim)
    logits = rows @ key.float().transpose(-1, -2)  # [B, Hkv, G*W, K]
    logits = logits.reshape(batch, heads, window_size, kv_len)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    hidden = positions > window[:, None]  # [W, K]
    attention = _softmax(logits.masked_fill(hidden, -math.inf)).mean(2)  # [B, H, K]
    in_window = positions >= kv_len - window_size
    attention = attention.masked_fill(in_window, -math.inf)
    # max_pool1d specialises a symbolic length; the two-dimensional op does not. It pads with -inf.
    pooled = F.max_pool2d(
        attention[:, :, None], (1, kernel_size), stride=1, padding=(0, kernel_size // 2)
    )
    scores = pooled.reshape(batch, kv_heads, groups, kv_len).mean(2)
    return scores.masked_fill(in_window, 0.0)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the keys. The sum is a product with ones: a generated C++ sum changes its form
    above 4,096 terms, which would guard on K and cost a second graph for long prompts."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / (weights @ weights.new_ones(weights.shape[-1], 1))
