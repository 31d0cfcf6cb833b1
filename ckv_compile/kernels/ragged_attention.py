"""Attention over a packed prefix, whose heads differ in length, and a dense tail: no padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .cpu import few_queries as cpu


def ragged_attention(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    cu_kv_lens: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: Any = None,
    triton: bool = False,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.ragged_attention`, traceable.

    Every query sees all of the prefix; of the tail what ``mask`` or ``is_causal`` lets it see. The
    two parts are merged by their log-sum-exps, so neither is padded nor copied.

    Args:
        query: ``[B, H, Q, D]``.
        packed_key, packed_value: ``[T, D]`` and ``[T, Dv]``, the entries of all heads, one head
            after the other.
        cu_kv_lens: ``[B * Hkv + 1]`` int32; KV head ``h`` of row ``b`` has the entries from
            ``cu_kv_lens[b * Hkv + h]`` up to the next one's, of which there may be none.
        key, value: ``[B, Hkv, t, D]`` and ``[B, Hkv, t, Dv]``, the tail.
        mask: broadcasts to ``[B, H, Q, t]``; bool, true where a key is seen, or added to logits.
        is_causal: whether query ``i`` sees the keys of the tail up to ``i``, as SDPA has it.
        scale: of the logits, ``1 / sqrt(D)`` if None.
        triton: whether the device has Triton's kernels.

    Returns:
        ``[B, H, Q, Dv]`` in the query's dtype; computed in float32.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    rows = heads // kv_heads * q_len
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # The queries of a group behind each other: they read the same keys.
    grouped = query.reshape(batch * kv_heads, rows, head_dim)
    attend = torch.ops.ckv_compile.prefix_attention
    if triton:
        from .gpu import ragged_attention as gpu

        attend = gpu.prefix_attention
    prefix, prefix_lse = attend(grouped, packed_key, packed_value, cu_kv_lens, scale)

    logits = (grouped.float() * scale) @ key.float().reshape(batch * kv_heads, -1, head_dim).mT
    logits = logits.view(batch, heads, q_len, -1)
    if is_causal:
        tail = torch.arange(key.shape[2], device=key.device)
        mask = tail <= torch.arange(q_len, device=key.device)[:, None]
    if mask is not None:
        hidden = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -math.inf) if hidden else logits + mask.float()
    largest = torch.maximum(logits.amax(-1), prefix_lse.view(batch, heads, q_len))
    # Where nothing at all is seen the result is zero, not NaN.
    largest = largest.masked_fill(largest == -math.inf, 0.0)[..., None]
    weights = (logits - largest).exp()  # [B, H, Q, t]
    before = (prefix_lse.view(batch, heads, q_len, 1) - largest).exp()
    seen = weights.view(batch * kv_heads, rows, -1) @ value.float().flatten(0, 1)
    total = (before + weights.sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    shape = (batch, heads, q_len, value.shape[3])
    out = (seen.view(shape) + before * prefix.view(shape)) / total
    return out.to(query.dtype)


@torch.library.custom_op("ckv_compile::prefix_attention", mutates_args=())
def _prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`ckv_compile.kernels.cpu.few_queries.attend_packed`."""
    query = query.float() * scale
    if query.device.type == "cpu" and cpu.takes(key, query.shape[1]):
        return cpu.attend_packed(query, key, value, cu_kv_lens)
    out = query.new_zeros(*query.shape[:2], value.shape[1])
    lse = query.new_full(query.shape[:2], -math.inf)
    starts = cu_kv_lens.tolist()
    for head, (start, end) in enumerate(itertools.pairwise(starts)):
        if start < end:
            logits = query[head] @ key[start:end].float().T
            lse[head] = logits.logsumexp(-1)
            out[head] = (logits - lse[head, :, None]).exp_() @ value[start:end].float()
    return out, lse


@_prefix_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:2], value.shape[1], dtype=torch.float32)
    return out, query.new_empty(query.shape[:2], dtype=torch.float32)
