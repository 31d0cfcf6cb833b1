"""Attention over packed entries on a GPU: a head's entries are shared out over several programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .tiles import in_halves, padded

# Programs for each head of a decode step: as many as keep a GPU busy when a batch has few heads.
_SPLITS = 32


@triton.jit
def _rows_of(source, at, dim, count, size, halves: tl.constexpr):
    """Entries ``at`` of ``[T, size]``, zeros where there are none."""
    tile = tl.load(
        source + at[:, None] * size + dim[None, :],
        mask=(at < count)[:, None] & (dim < size)[None, :],
        other=0.0,
    )
    return tile if halves else tile.to(tl.float32)


@triton.jit
def prefix_attention_kernel(
    query, key, value, cu_kv_lens, out, lse, rows, scale,
    splits: tl.constexpr, halves: tl.constexpr, head_dim: tl.constexpr, value_dim: tl.constexpr,
    block_r: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """``softmax(query key^T scale) value`` over one part of a head's entries, and its log-sum-exp.

    ``out [heads, splits, rows, Dv]``, ``lse [heads, splits, rows]``, both float32.
    """
    tiles = tl.cdiv(rows, block_r)
    part = tl.program_id(0) // tiles
    head = (part // splits).to(tl.int64)
    row = (tl.program_id(0) % tiles) * block_r + tl.arange(0, block_r).to(tl.int64)
    begin = tl.load(cu_kv_lens + head).to(tl.int64)
    end = tl.load(cu_kv_lens + head + 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(end - begin, splits), block_k) * block_k
    begin += (part % splits) * share
    end = tl.minimum(begin + share, end)
    dim, value_at = tl.arange(0, block_d).to(tl.int64), tl.arange(0, block_v).to(tl.int64)
    q = _rows_of(query + head * rows * head_dim, row, dim, rows, head_dim, halves)
    most = tl.full((block_r,), float("-inf"), tl.float32)
    total = tl.zeros((block_r,), tl.float32)
    seen = tl.zeros((block_r, block_v), tl.float32)
    for start in range(begin, end, block_k):
        at = start + tl.arange(0, block_k).to(tl.int64)
        k = _rows_of(key, at, dim, end, head_dim, halves)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.cast(scale, tl.float32)
        logits = tl.where((at < end)[None, :], logits, float("-inf"))
        largest = tl.maximum(most, tl.max(logits, axis=1))
        weights = tl.exp(logits - largest[:, None])
        before = tl.exp(most - largest)
        v = _rows_of(value, at, value_at, end, value_dim, halves)
        product = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        seen = seen * before[:, None] + product
        total = total * before + tl.sum(weights, axis=1)
        most = largest
    slot = (head * splits + part % splits) * rows + row
    # Of no entries the sum is 0: the result is 0, and its logarithm -inf, without a 0 / 0.
    seen = seen / tl.maximum(total, 1e-38)[:, None]
    inside = (row < rows)[:, None] & (value_at < value_dim)[None, :]
    tl.store(out + slot[:, None] * value_dim + value_at[None, :], seen, mask=inside)
    result = tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-38)), float("-inf"))
    tl.store(lse + slot, result, mask=row < rows)


@triton_op("ckv_compile::prefix_attention_triton", mutates_args={})
def _parts(
    query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor, scale: float, splits: int
) -> tuple[Tensor, Tensor]:
    """Each head's entries in ``splits`` parts, ``[heads, splits, rows, Dv]`` and without ``Dv``."""
    heads, rows, head_dim = query.shape
    value_dim = value.shape[1]
    out = torch.empty(heads, splits, rows, value_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(heads, splits, rows, dtype=torch.float32, device=query.device)
    halves = in_halves(query, key) and value.dtype == key.dtype
    block_r = 16
    wrap_triton(prefix_attention_kernel)[(heads * splits * triton.cdiv(rows, block_r),)](
        query, key, value, cu_kv_lens, out, lse, rows, scale,
        splits=splits, halves=halves, head_dim=head_dim, value_dim=value_dim, block_r=block_r,
        block_k=64 if halves else 16, block_d=padded(head_dim), block_v=padded(value_dim),
    )  # fmt: skip
    return out, lse


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Twin of ``ckv_compile::prefix_attention``; see the one for CPUs."""
    rows = query.shape[1]
    # Many queries keep a GPU busy by themselves, and their parts would fill its memory.
    splits = _SPLITS if isinstance(rows, int) and rows <= 64 else 1
    operands = (query.contiguous(), key.contiguous(), value.contiguous(), cu_kv_lens.contiguous())
    out, lse = _parts(*operands, scale, splits)
    largest = lse.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (lse - largest).exp()  # [heads, splits, rows]
    total = weights.sum(1)
    merged = (weights[..., None] * out).sum(1)
    merged = merged / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return merged, total.log() + largest[:, 0]
