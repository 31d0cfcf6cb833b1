"""How far a value, seen through the output projection, can move the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of the intermediate [rows, E]: it stays in a core's L2 cache on a CPU and in memory bounds
# on a GPU, however long the prompt is.
_BLOCK_BYTES = {"cpu": 1 << 20, "other": 1 << 26}


def projected_norm(
    value: Tensor, weight: Tensor | None, in_out: bool, heads: int, norm: str
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.projected_norm`, traceable.

    Args:
        value: ``[B, Hkv, K, Dv]``, any float dtype.
        weight: ``[E, H*Dv]``, or ``[H*Dv, E]`` if ``in_out``; None for norm="value".
        heads: H, the number of query heads.
        norm: "l1" or "l2"; or "value", the L1 norm of the value as it is.

    Returns:
        ``[B, Hkv, K]`` float32, the mean over the query heads of a group.
    """
    if norm == "value":
        return value.float().abs().sum(-1)
    assert weight is not None
    if norm == "l2":
        return _l2(value, weight, in_out, heads)
    return torch.ops.ckv_compile.projected_norm_l1(value, weight, in_out, heads)


def _per_head(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """``W_O`` as ``[H, Dv, E]``, a view."""
    if in_out:
        return weight.reshape(heads, -1, weight.shape[1])
    return weight.reshape(weight.shape[0], heads, -1).permute(1, 2, 0)


def _l2(value: Tensor, weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """``||v W|| = sqrt(v G v^T)`` with the Gram matrix ``G = W W^T``: no product as wide as E."""
    kv_heads, head_dim = value.shape[1], value.shape[3]
    groups = heads // kv_heads
    per_head = _per_head(weight, in_out, heads).float()
    gram = per_head @ per_head.transpose(-1, -2)  # [H, Dv, Dv]
    gram = gram.reshape(kv_heads, groups, head_dim, head_dim)
    rows = value.float()[:, :, None]  # [B, Hkv, 1, K, Dv]
    squared = ((rows @ gram) * rows).sum(-1)  # [B, Hkv, G, K]
    # Rounding may leave a tiny negative number where the norm is zero.
    return squared.clamp(min=0).sqrt().mean(2)


@torch.library.custom_op("ckv_compile::projected_norm_l1", mutates_args=())
def _l1(value: Tensor, weight: Tensor, in_out: bool, heads: int) -> Tensor:
    # An op of ours, opaque to the compiler: Inductor does not fuse a reduction into a product and
    # would write the whole [B, H, K, E] to memory first. Here only a block of it ever exists.
    batch, kv_heads, kv_len, _ = value.shape
    groups, hidden_size = heads // kv_heads, weight.shape[1 if in_out else 0]
    norms = torch.zeros(batch, kv_heads, kv_len, dtype=torch.float32, device=value.device)
    per_head = _per_head(weight, in_out, heads)
    block_bytes = _BLOCK_BYTES["cpu" if value.device.type == "cpu" else "other"]
    block = max(block_bytes // (4 * hidden_size), 16)
    buffer = torch.empty(block, hidden_size, dtype=torch.float32, device=value.device)
    for h in range(heads):
        rows = per_head[h].float()  # [Dv, E]
        for b in range(batch):
            for start in range(0, kv_len, block):
                part = value[b, h // groups, start : start + block].float()
                out = buffer[: part.shape[0]]
                torch.mm(part, rows, out=out)
                norms[b, h // groups, start : start + block] += out.abs_().sum(-1)
    return norms.div_(groups)


@_l1.register_fake
def _(value: Tensor, weight: Tensor, in_out: bool, heads: int) -> Tensor:
    return value.new_empty(value.shape[:3], dtype=torch.float32)
