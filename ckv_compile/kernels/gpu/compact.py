"""Copy the kept entries on a GPU: K and V in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .tiles import padded


@triton.jit
def _copy_rows(
    cache, out, slot, row, budget, head, source, cache_k, cache_d,
    head_dim: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, block_d).to(tl.int64)
    inside = (slot < budget)[:, None] & (dim < head_dim)[None, :]
    entries = tl.load(
        cache + source + row[:, None] * cache_k + dim[None, :] * cache_d, mask=inside, other=0
    )
    tl.store(out + (head * budget + slot[:, None]) * head_dim + dim[None, :], entries, mask=inside)


@triton.jit
def compact_kernel(
    key, value, keep, key_out, value_out, kv_heads, budget,
    key_b, key_h, key_k, key_d, value_b, value_h, value_k, value_d, keep_b, keep_h, keep_k,
    key_dim: tl.constexpr, value_dim: tl.constexpr, block_k: tl.constexpr,
    key_block: tl.constexpr, value_block: tl.constexpr,
):  # fmt: skip
    """``out[b, h, i] = cache[b, h, keep[b, h, i]]`` of K and V, contiguous."""
    tiles = tl.cdiv(budget, block_k)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads
    slot = (tl.program_id(0) % tiles) * block_k + tl.arange(0, block_k).to(tl.int64)
    row = tl.load(
        keep + batch * keep_b + kv_head * keep_h + slot * keep_k, mask=slot < budget, other=0
    )
    source = batch * key_b + kv_head * key_h
    _copy_rows(key, key_out, slot, row, budget, head, source, key_k, key_d, key_dim, key_block)
    source = batch * value_b + kv_head * value_h
    _copy_rows(
        value, value_out, slot, row, budget, head, source, value_k, value_d, value_dim, value_block
    )


@triton_op("ckv_compile::compact_triton", mutates_args={})
def compact(key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`ckv_compile.kernels.reference.compact`; see the one for CPUs."""
    batch, kv_heads, budget = keep.shape
    key_out = key.new_empty((*keep.shape, key.shape[3]))
    value_out = value.new_empty((*keep.shape, value.shape[3]))
    block_k = 32
    wrap_triton(compact_kernel)[(triton.cdiv(budget, block_k) * batch * kv_heads,)](
        key, value, keep, key_out, value_out, kv_heads, budget,
        *key.stride(), *value.stride(), *keep.stride(),
        key_dim=key.shape[3], value_dim=value.shape[3], block_k=block_k,
        key_block=padded(key.shape[3]), value_block=padded(value.shape[3]),
    )  # fmt: skip
    return key_out, value_out
