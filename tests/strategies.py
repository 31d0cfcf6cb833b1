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


@st.composite
def ragged(draw: st.DrawFn):
    """Operands of ragged attention; heads of 0 and 1 entry among them."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    groups, q_len = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([1, 2, 7]))
    head_dim, value_dim = draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from([8, 40]))
    tail = draw(st.sampled_from([q_len, q_len + 5]))
    lengths = draw(
        st.lists(
            st.sampled_from([0, 1, 2, 255, 256, 257, 600]) | st.integers(0, 40),
            min_size=batch * kv_heads,
            max_size=batch * kv_heads,
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    dtype = draw(DTYPES)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    before = draw(st.sampled_from([0, 3]))  # entries of other layers in the same store
    store = before + sum(lengths) + 2
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "float", "causal"]))
    if kind == "bool":
        mask = torch.rand(batch, 1, q_len, tail, generator=generator) > 0.5
    if kind == "float":
        mask = randn(1, 1, q_len, tail).float()
    return {
        "query": randn(batch, kv_heads * groups, q_len, head_dim) * draw(st.sampled_from([1, 30])),
        "packed_key": randn(store, head_dim),
        "packed_value": randn(store, value_dim),
        "cu_kv_lens": torch.tensor([0, *lengths]).cumsum(0).add(before).int(),
        "key": randn(batch, kv_heads, tail, head_dim),
        "value": randn(batch, kv_heads, tail, value_dim),
        "mask": mask,
        "is_causal": kind == "causal",
        "scale": draw(st.sampled_from([None, 0.3])),
    }


def assert_attends_alike(actual: Tensor, expected: Tensor, operands: dict[str, Any]) -> None:
    """Equal but for the rounding of logits, which exp makes a relative error, and of the result."""
    assert actual.dtype == expected.dtype and not actual.isnan().any()
    lengths = [operands[name].float().norm(dim=-1).max() for name in ("query", "packed_key", "key")]
    scale = operands["scale"] or operands["query"].shape[-1] ** -0.5
    logit = float(lengths[0] * max(lengths[1:])) * scale
    step = torch.finfo(actual.dtype).eps
    tolerance = max(32 * FLOAT32_STEP * (16 + logit), 8 * step)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=4 * tolerance)
