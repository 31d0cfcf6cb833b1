"""Biases and sinks beside the logits: the traced twin against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT32_STEP, SETTINGS, site

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference, window_attention
from ckv_compile.methods.evict import EvictKV

SIZES = st.sampled_from(["B H Q K", "1 H Q K", "1 H 1 K", "H 1 K", "B*H 1 K", "Q K", "1 1 1 1"])


def biased(site: dict[str, Any], sizes: str) -> torch.Tensor:
    batch, heads, q_len, _ = site["query"].shape
    named = {"B": batch, "H": heads, "Q": q_len, "K": site["key"].shape[2], "1": 1}
    named["B*H"] = batch * heads
    shape = [named[size] for size in sizes.split()]
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(sizes))) * 3


@SETTINGS
@given(site(), SIZES, st.booleans(), st.booleans(), st.sampled_from([None, 5.0]))
def test_window_attention_with_bias_and_sinks(
    site: dict[str, Any], sizes: str, sinks: bool, padded: bool, softcap: float | None
) -> None:
    """Prevents a bias of other queries than the window's, and sinks that take no attention."""
    query, key = site["query"], site["key"]
    (batch, heads, _, _), kv_len = query.shape, key.shape[2]
    bias = window_attention.with_heads(biased(site, sizes), heads)
    logits = torch.linspace(-4.0, 6.0, heads) if sinks else None
    real = torch.arange(kv_len).expand(batch, -1) >= kv_len // 3 if padded else None
    options = (query, key, 0.5, 4, 3, softcap, real, bias, logits)
    actual = window_attention.window_attention(*options)
    assert actual.isfinite().all()
    if kv_len > 8:
        expected = reference.window_attention(*options)
        widest = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
        tolerance = 32 * FLOAT32_STEP * (16 + float(widest))
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30)


def test_a_sink_takes_attention_but_not_its_order():
    """A sink that is left out would only scale what one query gives, but queries are averaged."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 40, 8, generator=generator) * 3 for _ in range(2))
    plain = window_attention.window_attention(query, key, None, 4, 1)
    sunk = window_attention.window_attention(query, key, None, 4, 1, sinks=torch.tensor([2.0, 4.0]))
    assert (sunk <= plain).all() and (sunk[plain > 0] < plain[plain > 0]).all()


@pytest.mark.parametrize("merged", [False, True])
def test_the_node_keeps_what_the_oracle_keeps_and_says_where_it_stood(merged):
    """Of two biases the sum counts; positions that are not those of K would move every bias."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, kv_len = 2, 4, 60
    query = torch.randn(batch, heads, kv_len, 8, generator=generator)
    key, value = (torch.randn(batch, 2, kv_len, 8, generator=generator) for _ in range(2))
    weight = torch.randn(16, heads * 8, generator=generator)
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.0])
    alibi = slopes[:, None, None] * torch.arange(kv_len)
    alibi = alibi.repeat(batch, 1, 1) if merged else alibi
    other = torch.randn(kv_len, kv_len, generator=generator)
    config = EvictionConfig(budget=20, window_size=4)
    node = EvictKV(config, in_out=False, from_config=True)
    keys, values, positions = node(query, key, value, weight, biases=(alibi, other))
    bias = alibi.reshape(-1, heads, 1, kv_len) + other
    scores = reference.window_attention(query, key, None, 4, config.kernel_size, bias=bias)
    norm = reference.projected_norm(value, weight, False, heads, "l1")
    expected = reference.select(scores, norm, 20, 4, 0.5, config.epsilon)
    assert torch.equal(positions, expected)
    without = node(query, key, value, weight)[2]
    assert not torch.equal(positions, without)
    index = positions[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(keys, key.gather(2, index)) and torch.equal(values, value.gather(2, index))


@SETTINGS
@given(site(), st.integers(1, 9), st.sampled_from([1, 4, 32]), st.booleans())
def test_cross_attention(site: dict[str, Any], q_len: int, window_size: int, sinks: bool) -> None:
    """Prevents a causal mask between two sequences, and a short window that counts one twice."""
    query, key = site["query"][:, :, :q_len], site["key"]
    logits = torch.linspace(-4.0, 6.0, query.shape[1]) if sinks else None
    options = (query, key, 0.5, window_size, 3, None, logits)
    actual = window_attention.cross_attention(*options)
    expected = reference.cross_attention(*options)
    widest = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
    torch.testing.assert_close(
        actual, expected, rtol=32 * FLOAT32_STEP * (8 + float(widest)), atol=1e-30
    )
