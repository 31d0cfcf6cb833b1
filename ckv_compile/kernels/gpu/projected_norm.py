"""``||v W_O||`` on a GPU: the product is reduced tile by tile and never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .tiles import in_halves, padded


@triton.jit
def projected_norm_kernel(
    value, weight, out, kv_heads, kv_len, width,
    value_b, value_h, value_k, value_d, weight_in, weight_out,
    groups: tl.constexpr, head_dim: tl.constexpr, quadratic: tl.constexpr, halves: tl.constexpr,
    block_k: tl.constexpr, block_d: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    """``out[b, g, i] = mean_h sum_e |v_i W[h]|_e``; ``sqrt(v_i W[h] v_i^T)`` if ``quadratic``.

    ``value [B, Hkv, K, Dv]``, ``weight`` as ``[H*Dv, width]`` by its strides, ``out [B, Hkv, K]``.
    One program for ``block_k`` keys of a KV head, so a tile of V is read once.
    """
    tiles = tl.cdiv(kv_len, block_k)
    head = tl.program_id(0) // tiles
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    key = (tl.program_id(0) % tiles) * block_k + tl.arange(0, block_k).to(tl.int64)
    dim = tl.arange(0, block_d).to(tl.int64)
    rows = value + batch * value_b + kv_head * value_h + key[:, None] * value_k
    inside = (key < kv_len)[:, None]
    v = tl.load(rows + dim[None, :] * value_d, mask=inside & (dim < head_dim)[None, :], other=0.0)
    if not halves:
        v = v.to(tl.float32)
    mean = tl.zeros((block_k,), tl.float32)
    for group in range(groups):
        row = (kv_head * groups + group) * head_dim + dim
        norm = tl.zeros((block_k,), tl.float32)
        for start in range(0, width, block_e):
            column = start + tl.arange(0, block_e).to(tl.int64)
            w = tl.load(
                weight + row[:, None] * weight_in + column[None, :] * weight_out,
                mask=(dim < head_dim)[:, None] & (column < width)[None, :],
                other=0.0,
            )
            if not halves:
                w = w.to(tl.float32)
            product = tl.dot(v, w, input_precision="ieee")
            if quadratic:
                again = tl.load(
                    rows + column[None, :] * value_d,
                    mask=inside & (column < head_dim)[None, :],
                    other=0.0,
                )
                norm += tl.sum(product * again.to(tl.float32), axis=1)
            else:
                norm += tl.sum(tl.abs(product), axis=1)
        # Rounding may leave a tiny negative number where the norm is zero.
        mean += tl.sqrt(tl.maximum(norm, 0.0)) if quadratic else norm
    tl.store(out + head.to(tl.int64) * kv_len + key, mean / groups, mask=key < kv_len)


@triton_op("ckv_compile::projected_norm_triton", mutates_args={})
def projected_norm(
    value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.projected_norm.projected_norm` for "l1".

    ``quadratic``: of ``sqrt(v W v^T)``, where the weight is a Gram matrix ``[H*Dv, Dv]``.
    """
    batch, kv_heads, kv_len, head_dim = value.shape
    out = torch.empty(batch, kv_heads, kv_len, dtype=torch.float32, device=value.device)
    halves = in_halves(value, weight)
    # A group's part of W is read once for each tile of keys. Full precision keeps its operands in
    # registers: larger tiles spill.
    block_d = padded(head_dim)
    block_k, block_e, warps = (128, 64, 8) if halves else (32 if block_d <= 128 else 16, 16, 4)
    strides = weight.stride() if in_out else weight.stride()[::-1]
    wrap_triton(projected_norm_kernel)[(triton.cdiv(kv_len, block_k) * batch * kv_heads,)](
        value, weight, out, kv_heads, kv_len, weight.shape[1 if in_out else 0],
        *value.stride(), *strides,
        groups=heads // kv_heads, head_dim=head_dim, quadratic=quadratic, halves=halves,
        block_k=block_k, block_d=block_d, block_e=block_e, num_warps=warps,
    )  # fmt: skip
    return out
