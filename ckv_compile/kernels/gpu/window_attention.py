"""Attention of the observation window on a GPU: two passes over K, no ``[H, W, K]`` in memory."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .tiles import in_halves, padded


@triton.jit
def _logits(
    query, key_tile, bias, real, window, batch, head, key, kv_len, first, rows,
    scale, softcap, query_b, query_h, query_q, query_d,
    bias_b, bias_h, bias_q, bias_k, real_b, real_k, window_b,
    causal: tl.constexpr, halves: tl.constexpr, head_dim: tl.constexpr,
    block_w: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Logits ``[block_w, block_k]`` of one head's window on a tile of keys, -inf where hidden."""
    row, dim = tl.arange(0, block_w).to(tl.int64), tl.arange(0, block_d).to(tl.int64)
    position = tl.load(window + batch * window_b + row, mask=row < rows, other=0)
    index = tl.maximum(position - first, 0)
    q = tl.load(
        query + batch * query_b + head * query_h
        + index[:, None] * query_q + dim[None, :] * query_d,
        mask=(row < rows)[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )  # fmt: skip
    if not halves:
        q = q.to(tl.float32)
    # Inductor hands scalars over as float64.
    logits = tl.dot(q, key_tile, input_precision="ieee") * tl.cast(scale, tl.float32)
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)
        logits = (2 * tl.sigmoid(2 * logits / cap) - 1) * cap  # tanh
    seen = (row < rows)[:, None] & (key < kv_len)[None, :]
    if bias is not None:
        at = batch * bias_b + head * bias_h + index[:, None] * bias_q + key[None, :] * bias_k
        logits += tl.load(bias + at, mask=seen, other=0.0).to(tl.float32)
    if causal:
        seen = seen & (key[None, :] <= position[:, None])
    if real is not None:
        mask = tl.load(real + batch * real_b + key * real_k, mask=key < kv_len, other=0)
        seen = seen & (mask != 0)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _key_tile(
    keys, batch, kv_head, key, kv_len, key_b, key_h, key_k, key_d,
    halves: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """K transposed, ``[block_d, block_k]``."""
    dim = tl.arange(0, block_d).to(tl.int64)
    tile = tl.load(
        keys + batch * key_b + kv_head * key_h + key[None, :] * key_k + dim[:, None] * key_d,
        mask=(dim < head_dim)[:, None] & (key < kv_len)[None, :],
        other=0.0,
    )
    if not halves:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def softmax_stats_kernel(
    query, keys, bias, real, window, largest, total, kv_heads, kv_len, first, rows,
    scale, softcap, query_b, query_h, query_q, query_d, key_b, key_h, key_k, key_d,
    bias_b, bias_h, bias_q, bias_k, real_b, real_k, window_b,
    groups: tl.constexpr, causal: tl.constexpr, halves: tl.constexpr, head_dim: tl.constexpr,
    block_w: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """First pass: of each tile of keys and each query the maximum and the sum of exponentials.

    ``largest``, ``total [B, H, rows, tiles]``. One program for ``block_k`` keys of a KV head.
    """
    tiles = tl.cdiv(kv_len, block_k)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    key = tile * block_k + tl.arange(0, block_k).to(tl.int64)
    k = _key_tile(
        keys, batch, kv_head, key, kv_len, key_b, key_h, key_k, key_d, halves, head_dim, block_d
    )
    row = tl.arange(0, block_w).to(tl.int64)
    for group in range(groups):
        head = kv_head * groups + group
        logits = _logits(
            query, k, bias, real, window, batch, head, key, kv_len, first, rows,
            scale, softcap, query_b, query_h, query_q, query_d,
            bias_b, bias_h, bias_q, bias_k, real_b, real_k, window_b,
            causal, halves, head_dim, block_w, block_d,
        )  # fmt: skip
        most = tl.max(logits, axis=1)
        # A query that sees none of the tile: exp(-inf - 0) is 0, exp(-inf + inf) is not.
        base = tl.where(most == float("-inf"), 0.0, most)
        out = ((batch * kv_heads * groups + head) * rows + row) * tiles + tile
        tl.store(largest + out, most, mask=row < rows)
        tl.store(total + out, tl.sum(tl.exp(logits - base[:, None]), axis=1), mask=row < rows)


@triton.jit
def mean_attention_kernel(
    query, keys, bias, real, window, lse, out, kv_heads, kv_len, first, rows,
    scale, softcap, query_b, query_h, query_q, query_d, key_b, key_h, key_k, key_d,
    bias_b, bias_h, bias_q, bias_k, real_b, real_k, window_b,
    groups: tl.constexpr, causal: tl.constexpr, halves: tl.constexpr, head_dim: tl.constexpr,
    block_w: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Second pass: ``out[b, h, i] = sum_q exp(logit[q, i] - lse[b, h, q])``, ``[B, H, K]``."""
    tiles = tl.cdiv(kv_len, block_k)
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    key = (tl.program_id(0) % tiles) * block_k + tl.arange(0, block_k).to(tl.int64)
    k = _key_tile(
        keys, batch, kv_head, key, kv_len, key_b, key_h, key_k, key_d, halves, head_dim, block_d
    )
    row = tl.arange(0, block_w).to(tl.int64)
    for group in range(groups):
        head = kv_head * groups + group
        logits = _logits(
            query, k, bias, real, window, batch, head, key, kv_len, first, rows,
            scale, softcap, query_b, query_h, query_q, query_d,
            bias_b, bias_h, bias_q, bias_k, real_b, real_k, window_b,
            causal, halves, head_dim, block_w, block_d,
        )  # fmt: skip
        of_head = batch * kv_heads * groups + head
        normaliser = tl.load(lse + of_head * rows + row, mask=row < rows, other=float("inf"))
        attention = tl.sum(tl.exp(logits - normaliser[:, None]), axis=0)
        tl.store(out + of_head * kv_len + key, attention, mask=key < kv_len)


@triton_op("ckv_compile::summed_attention_triton", mutates_args={})
def summed_attention(
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
    """Attention summed over those queries at ``window`` ``[1 or B, W]`` that are asked."""
    (batch, heads, q_len, head_dim), rows = query.shape, window.shape[1]
    kv_heads, kv_len = key.shape[1], key.shape[2]
    halves, block_d = in_halves(query, key), padded(head_dim)
    # A tile of keys stays in shared memory for all heads of its group.
    block_k = (128 if block_d <= 128 else 32) if halves else 16
    grid = (triton.cdiv(kv_len, block_k) * batch * kv_heads,)
    largest = query.new_empty(
        (batch, heads, rows, triton.cdiv(kv_len, block_k)), dtype=torch.float32
    )
    total = torch.empty_like(largest)

    def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
        """Zero where the tensor is the same for all."""
        if tensor is None:
            return (0,) * dims
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        return tuple(0 if size == 1 else stride for size, stride in pairs)

    sizes = (kv_heads, kv_len, kv_len - q_len if causal else 0, rows, scale, softcap)
    steps = (
        *query.stride(), *key.stride(), *strides(bias, 4), *strides(real, 2),
        0 if window.shape[0] == 1 else window.stride(0),
    )  # fmt: skip
    options = {
        "groups": heads // kv_heads, "causal": causal, "halves": halves, "head_dim": head_dim,
        "block_w": padded(rows), "block_k": block_k, "block_d": block_d,
        "num_warps": 4 if halves else 8,
    }  # fmt: skip
    operands = (query, key, bias, None if real is None else real.to(torch.int8), window)
    wrap_triton(softmax_stats_kernel)[grid](*operands, largest, total, *sizes, *steps, **options)
    lse = _log_sum_exp(largest, total, sinks)
    # exp(-inf): who is not asked adds nothing.
    lse = torch.where(asked[:, None], lse, math.inf).contiguous()
    out = query.new_empty((batch, heads, kv_len), dtype=torch.float32)
    wrap_triton(mean_attention_kernel)[grid](*operands, lse, out, *sizes, *steps, **options)
    return out


def _log_sum_exp(largest: Tensor, total: Tensor, sinks: Tensor | None) -> Tensor:
    """Of the tiles ``[B, H, W, tiles]``, and of a sink for each head: ``[B, H, W]``."""
    most = largest.amax(-1)
    if sinks is not None:
        most = most.maximum(sinks.float()[:, None])
    most = most.clamp(min=torch.finfo(torch.float32).min)  # of a query that sees nothing
    summed = (total * (largest - most[..., None]).exp()).sum(-1)
    if sinks is not None:
        summed = summed + (sinks.float()[:, None] - most).exp()
    # log(0) is -inf, and exp(-inf + inf) is no number.
    return torch.where(summed > 0, most + summed.log(), math.inf)
