"""What tests of kernels draw their examples from."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

SETTINGS = settings(deadline=None, max_examples=50)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTHS = st.integers(1, 48) | st.sampled_from([1, 2, 31, 32, 33, 63, 127, 257])
FLOAT32_STEP = 2.0**-23


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values with other strides: ``[B, K, H, D]`` in memory, as a projection leaves it."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    wide = wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:-2]
    wide.copy_(tensor)
    assert wide.shape == tensor.shape and (wide.stride() != tensor.stride())
    return wide


@st.composite
def site(draw: st.DrawFn, lengths: st.SearchStrategy[int] = LENGTHS) -> dict[str, Any]:
    """What an eviction node sees: query, key, value, weight, in_out; all of one dtype."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups, head_dim = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([8, 24, 128]))
    kv_len, hidden_size = draw(lengths), draw(st.sampled_from([1, 16, 37]))
    dtype, in_out, heads = draw(DTYPES), draw(st.booleans()), kv_heads * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = randn(batch, heads, kv_len, head_dim)
    # 0: every key alike, every score equal.
    key = randn(batch, kv_heads, kv_len, head_dim) * draw(st.sampled_from([0.0, 1.0, 3.0]))
    value = randn(batch, kv_heads, kv_len, head_dim)
    kind = draw(st.sampled_from(["random", "zero", "one huge"]))
    if kind == "zero":
        value[:, :, ::2] = 0
    if kind == "one huge":
        value[:, :, draw(st.integers(0, kv_len - 1))] *= 1e4
    features = heads * head_dim
    weight = randn(features, hidden_size) if in_out else randn(hidden_size, features)
    if draw(st.booleans()):
        query, key, value = map(non_contiguous, (query, key, value))
        weight = weight.T.contiguous().T
    return {"query": query, "key": key, "value": value, "weight": weight, "in_out": in_out}
