"""Undoing the repetition over groups: the same numbers, no copy, and only where it is proved."""

from __future__ import annotations

import capture
import pytest
import torch
import torch.nn.functional as F
from capture import captured
from families import FAMILIES, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig
from ckv_compile.passes.pipeline import rewrite

CONFIG = EvictionConfig(budget=9, window_size=3)


def repeat(x):
    batch, heads, length, head_dim = x.shape
    x = x[:, :, None].expand(batch, heads, 4 // heads, length, head_dim)
    return x.reshape(batch, 4, length, head_dim)


def decode(kv_heads=2, kv_len=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 1, 16), (2, kv_heads, kv_len, 16), (2, kv_heads, kv_len, 16)]
    qkv = tuple(torch.randn(*shape, generator=generator) for shape in shapes)
    return (*qkv, capture.weight())


def graph_of(sdpa, repeated=repeat, **sizes):
    def forward(q, k, v, w):
        k, v = k * 2, v * 2
        out = sdpa(q, repeated(k), repeated(v)).transpose(1, 2).reshape(2, -1, 64)
        return F.linear(out, w), k, v

    return captured(forward, *decode(**sizes))


@settings(max_examples=12, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2]),
    kv_len=st.integers(2, 40),
    masked=st.sampled_from(["no", "bool", "added", "per row"]),
    seed=st.integers(0, 99),
)
def test_a_folded_step_gives_the_same_numbers(kv_heads, kv_len, masked, seed):
    """Heads in another order, or a mask on the wrong axis, would show here."""
    hidden = torch.arange(kv_len) % 3 == 1
    mask = {
        "no": None,
        "bool": ~hidden[None, None, None],
        "added": torch.where(hidden, -1e9, 0.0)[None, None, None],
        "per row": torch.stack([hidden, ~hidden | (torch.arange(kv_len) == 0)])[:, None, None],
    }[masked]
    gm = graph_of(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3),
        kv_heads=kv_heads,
        kv_len=kv_len,
    )
    expected = gm(*gm.meta["inputs"])
    found = rewrite(gm, CONFIG)
    assert len(found.folded) == 1
    for got, one in zip(gm(*gm.meta["inputs"]), expected, strict=True):
        torch.testing.assert_close(got, one)
    assert "expand" not in gm.code and "repeat" not in gm.code


def per_head(q, k, v):
    mask = torch.ones(1, 4, 1, k.shape[2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def upper_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("sdpa", [per_head, upper_left])
def test_what_is_not_proved_is_left_alone(sdpa):
    """A mask of its own for each head, or causality aligned with the first key."""
    gm = graph_of(sdpa)
    code = gm.code
    assert rewrite(gm, CONFIG).folded == () and gm.code == code


def test_another_order_of_heads_is_left_alone():
    """repeat() puts the groups outside: head i then reads KV head i % Hkv."""
    gm = graph_of(F.scaled_dot_product_attention, lambda x: x.repeat(1, 2, 1, 1))
    found = rewrite(gm, CONFIG)
    assert found.folded == ()


def test_it_can_be_turned_off():
    gm = graph_of(F.scaled_dot_product_attention)
    code = gm.code
    assert rewrite(gm, EvictionConfig(budget=9, window_size=3, rewrite_gqa=False)).folded == ()
    assert gm.code == code
    with pytest.raises(TypeError, match="rewrite_gqa='no'"):
        EvictionConfig(rewrite_gqa="no")


def test_a_second_run_folds_nothing():
    gm = graph_of(F.scaled_dot_product_attention)
    assert len(rewrite(gm, CONFIG).folded) == 1
    code = gm.code
    assert rewrite(gm, CONFIG).folded == () and gm.code == code


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox", "qwen3"])
def test_a_padded_step_of_a_model_is_folded(family):
    """With a mask transformers repeats K and V under the compiler; the report says who does not."""
    model, ids = tiny(family), prompt(60, batch=2)
    mask = torch.ones(2, 60).long()
    mask[0, :20] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    ckv_compile.optimize(model, 1.0, lowering="eager")
    assert torch.equal(model.generate(ids, **options), expected)
    rows = [row for row in ckv_compile.explain(model).sites if row.phase == "decode"]
    groups = 4 // FAMILIES[family][1]
    assert rows and all((row.action == "fold groups") == (groups > 1) for row in rows)
    assert all(row.cache == "written in place" for row in rows)


def test_a_fixed_cache_is_folded():
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    cache = EvictedCache(max_new_tokens=8)
    model.generate(prompt(60), max_new_tokens=4, do_sample=False, past_key_values=cache)
    actions = {row.action for row in ckv_compile.explain(model).sites if row.phase == "decode"}
    assert actions == {"fold groups"}, ckv_compile.explain(model)
