"""The eviction nodes whose GPU code the tests look at, and tensors for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu.codegen import Code, inductor_code
from torch import Tensor

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels.compact import compact
from ckv_compile.kernels.projected_norm import projected_norm
from ckv_compile.kernels.ragged_attention import ragged_attention
from ckv_compile.kernels.window_attention import window_attention
from ckv_compile.methods.evict import EvictKV


@dataclass(frozen=True)
class Shape:
    """Of an attention layer: batch, query and KV heads, head_dim, hidden size."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int


LLAMA = Shape(1, 32, 8, 128, 4096)  # Llama-3.1-8B
SMALL = Shape(2, 4, 2, 24, 40)
# Our kernels, each launched once.
OURS = (
    "softmax_stats_kernel",
    "mean_attention_kernel",
    "projected_norm_kernel",
    "select_kernel",
    "compact_kernel",
)
# Of later calls.
DECODE = ("prefix_attention_kernel",)
# Like no other size, so that what is dynamic is known by it.
KV_LEN, BUDGET = 5003, 503


@dataclass(frozen=True)
class Node:
    """An eviction node and how it is called."""

    module: EvictKV
    padded: bool = False

    def args(self, shape: Shape, kv_len: int, budget: int, device: str) -> list[Any]:
        """What the module takes, in bfloat16; pads at the left of the last row."""
        generator = torch.Generator().manual_seed(kv_len)

        def randn(*sizes: int) -> Tensor:
            if device == "meta":
                return torch.empty(sizes, dtype=torch.bfloat16, device=device)
            return torch.randn(*sizes, generator=generator).bfloat16()

        batch, features = shape.batch, shape.heads * shape.head_dim
        query = randn(batch, shape.heads, kv_len, shape.head_dim)
        key, value = (randn(batch, shape.kv_heads, kv_len, shape.head_dim) for _ in range(2))
        weight = randn(shape.hidden_size, features)
        args = [query, key, value, weight, None, None, torch.empty(budget, 0, device=device)]
        if self.padded:
            pads = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            pads[-1:] = kv_len // 4
            positions = torch.arange(kv_len, device=device)
            row_budgets = torch.full((batch,), budget, device=device)
            args += [(positions >= pads).long(), row_budgets - pads[:, 0] // 4]
        return args

    def small(self, kv_len: int) -> list[Any]:
        """Of numbers, for an interpreter."""
        return self.args(SMALL, kv_len, kv_len // 2, "cpu")


def _module(norm: str = "l1", method: str = "criticalkv") -> EvictKV:
    return EvictKV(EvictionConfig(0.1, method, norm=norm), in_out=False, from_config=False)


NODES = {
    "plain": Node(_module()),
    "l2": Node(_module("l2")),
    "padded": Node(_module(), padded=True),
}


@functools.cache
def generated(name: str, cc: int, shape: Shape = LLAMA) -> tuple[Code, Sequence[Any]]:
    """A node's code for compute capability ``cc``, K and the budget dynamic, and meta arguments."""
    node = NODES[name]
    args = node.args(shape, KV_LEN, BUDGET, "meta")
    return inductor_code(node.module, args, (KV_LEN, BUDGET), cc), args


@functools.cache
def products(dtype: torch.dtype, head_dim: int) -> Code:
    """The kernels whose tiles depend on the dtype and on head_dim, of a layer of 32 heads."""

    def fn(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, keep: Tensor, cu: Tensor
    ) -> object:
        norm = projected_norm(value, weight, False, 32, "l1", triton=True)
        gram = projected_norm(value, weight, False, 32, "l2", triton=True)
        scores = window_attention(query, key, None, 32, 7, 50.0, triton=True)
        asking, packed, tail = query[:, :, :1], key[0].flatten(0, 1), key[:, :, :40]
        seen = ragged_attention(asking, packed, packed, cu, tail, tail, triton=True)
        return norm, gram, scores, compact(key, value, keep, triton=True), seen

    query = torch.empty(1, 32, KV_LEN, head_dim, dtype=dtype, device="meta")
    key = torch.empty(1, 8, KV_LEN, head_dim, dtype=dtype, device="meta")
    weight = torch.empty(4096, 32 * head_dim, dtype=dtype, device="meta")
    keep = torch.empty(1, 8, 500, dtype=torch.int64, device="meta")
    cu = torch.empty(9, dtype=torch.int32, device="meta")
    return inductor_code(fn, (query, key, key, weight, keep, cu), (KV_LEN,))
