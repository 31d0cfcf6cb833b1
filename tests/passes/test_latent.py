"""Latent attention, gated outputs, graphs behind a break: matched where it is proved."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from capture import captured, weight
from families import prompt, tiny
from torch import nn

import ckv_compile
from ckv_compile import EvictionConfig
from ckv_compile.kernels import reference
from ckv_compile.passes.pipeline import rewrite

CONFIG = EvictionConfig(budget=9, window_size=3, kernel_size=3)
BATCH, HEADS, Q_LEN, LATENT, ROPE, WIDTH = 2, 4, 12, 24, 8, 16
DOWN, UP = torch.linspace(-1, 1, 2 * LATENT).view(2, LATENT), torch.ones(HEADS * 2 * WIDTH, 2)


def latent_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (BATCH, HEADS, Q_LEN, WIDTH + ROPE),
        (BATCH, 1, Q_LEN, LATENT),
        (BATCH, 1, Q_LEN, ROPE),
    ]
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    return (*tensors, torch.randn(HEADS * 2 * WIDTH, LATENT, generator=generator), weight())


def expanded(latent, rotary, up):
    """K and V of all heads, token by token of the two latents, as DeepSeek's models make them."""
    return parted(F.linear(latent, up), rotary)


def parted(both, rotary):
    both = both.view(BATCH, Q_LEN, HEADS, 2 * WIDTH).transpose(1, 2)
    plain, value = both.split([WIDTH, WIDTH], dim=-1)
    return torch.cat([plain, rotary.expand(-1, HEADS, -1, -1)], dim=-1), value


def copied(latent, rotary, up):
    """The same, written into parts of a new tensor."""
    both = F.linear(latent, up).view(BATCH, Q_LEN, HEADS, 2 * WIDTH).transpose(1, 2)
    plain, value = both.split([WIDTH, WIDTH], dim=-1)
    key = both.new_empty(BATCH, HEADS, Q_LEN, WIDTH + ROPE)
    key[..., :WIDTH].copy_(plain)
    key[..., WIDTH:].copy_(rotary.expand(-1, HEADS, -1, -1))
    return key, value


def with_lora(latent, rotary, up):
    """The same, through a LoRA of the projection."""
    return expanded(latent, rotary, up + UP @ DOWN * 0.5)


def added(latent, rotary, up):
    """As PEFT writes that, the adapter beside the layer."""
    both = F.linear(latent, up) + F.linear(F.linear(latent, DOWN), UP) * 0.5
    return parted(both, rotary)


def latent_attention(make):
    def forward(query, latent, rotary, up, out):
        latent, rotary = latent * 2, rotary * 2
        key, value = make(latent, rotary, up)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged = attended.transpose(1, 2).reshape(BATCH, Q_LEN, -1)
        return F.linear(merged, out), latent, rotary

    return forward


@pytest.mark.parametrize(
    ("make", "meant"), [(expanded, expanded), (copied, expanded), (added, with_lora)]
)
def test_latents_are_cut_by_the_mean_of_all_heads(make, meant):
    """The cache holds one head for all; an entry is worth what all heads think of it."""
    args = latent_inputs()
    gm = captured(latent_attention(make), *args)
    found = rewrite(gm, CONFIG)
    assert len(found.inserted) == 1 and found.sites[0].latent and not found.rejections
    _, kept_latent, kept_rotary = gm(*gm.meta["inputs"])

    latent, rotary = args[1] * 2, args[2] * 2
    key, value = meant(latent, rotary, args[3])
    scores = reference.window_attention(args[0], key, None, 3, 3).mean(1, keepdim=True)
    norms = reference.projected_norm(value, args[4], False, HEADS, "l1").mean(1, keepdim=True)
    keep = reference.select(scores, norms, 9, 3, 0.5, 1e-4)
    expected = reference.compact(latent, rotary, keep)
    got = sorted((kept_latent, kept_rotary), key=lambda x: -x.shape[-1])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def rolled(latent, rotary, up):
    return expanded(latent.roll(1, dims=2), rotary, up)


def summed(latent, rotary, up):
    return expanded(latent.cumsum(2), rotary, up)


def flipped(latent, rotary, up):
    key, value = expanded(latent, rotary, up)
    return key, value.flip(2)


def transposed(latent, rotary, up):
    """Tokens where features should be: the projection mixes them."""
    square = torch.eye(Q_LEN)
    return expanded(F.linear(latent.transpose(2, 3), square).transpose(2, 3), rotary, up)


def half_written(latent, rotary, up):
    key, value = copied(latent, rotary, up)
    key[..., WIDTH:].copy_(key[..., :ROPE].flip(2))
    return key, value


def shifted_in(latent, rotary, up):
    """The adapter reads the token before."""
    return parted(F.linear(latent, up) + F.linear(latent.roll(1, dims=2), up), rotary)


def spread(latent, rotary, up):
    """One token's projection is added to all."""
    return parted(F.linear(latent, up) + F.linear(latent[:, :, :1], up), rotary)


@pytest.mark.parametrize(
    "make", [rolled, summed, flipped, transposed, half_written, shifted_in, spread]
)
def test_tokens_that_are_mixed_on_the_way_are_refused(make):
    """Entry j of K must be made of entry j of the cache, or its score is another entry's."""
    found = rewrite(captured(latent_attention(make), *latent_inputs()), CONFIG)
    assert found.inserted == ()
    assert {r.reason.name for r in found.rejections} == {"CACHE_NOT_FOUND"}


# --- gates


def gated_by(gate):
    def forward(q, k, v, w, x):
        k, v = k * 2, v * 2
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        merged = out.reshape(BATCH, Q_LEN, -1)
        return F.linear(gate(merged, x), w), k, v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, Q_LEN, 16, generator=generator) for _ in range(3))
    x = torch.randn(BATCH, Q_LEN, HEADS * 16, generator=generator)
    return rewrite(captured(forward, q, k, v, weight(), x), CONFIG)


@pytest.mark.parametrize(
    "gate", [lambda o, x: o * x.sigmoid(), lambda o, x: x.sigmoid().view_as(o) * o]
)
def test_a_gate_from_elsewhere_is_left_out_of_the_scores_and_said(gate):
    found = gated_by(gate)
    assert len(found.inserted) == 1 and found.sites[0].projection.gated


@pytest.mark.parametrize(
    "gate",
    [
        lambda o, x: o * o.sigmoid(),
        lambda o, x: o * F.softmax(o + x, -1),
        lambda o, x: F.rms_norm(o, (64,)) * x,
        lambda o, x: (o + x) * x,
    ],
)
def test_a_gate_made_of_the_output_is_refused(gate):
    """Not linear in the values: the projected norm would be of something else."""
    found = gated_by(gate)
    assert found.inserted == () and found.rejections


# --- graph breaks of the model's own


class Breaking(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return self.inner(*args, **kwargs)


def broken(model):
    """The same model with a graph break in front of each attention."""
    for layer in model.model.layers:
        layer.self_attn = Breaking(layer.self_attn)
    return model


@pytest.mark.parametrize(
    "budget", [*(pytest.param(b, marks=pytest.mark.slow) for b in (1.0, 50)), 0.5]
)
def test_a_graph_behind_a_break_knows_the_present_budget(budget):
    """Compiled at another budget first: what was true then must not be baked in."""
    model = ckv_compile.optimize(broken(tiny()), 0.75, lowering="eager")
    plain = ckv_compile.optimize(tiny(), budget, lowering="eager")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    model.generate(prompt(90), **options)
    ckv_compile.optimize(model, budget, lowering="eager")
    for n in (90, 70):
        got, expected = (one.generate(prompt(n), **options) for one in (model, plain))
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys)


class SoftPrompt(nn.Module):
    """Puts four tokens of its own in front of what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.own = nn.Parameter(torch.randn(1, 4, model.config.hidden_size))
        self._supports_default_dynamic_cache = model._supports_default_dynamic_cache

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        embeds = self.model.get_input_embeddings()(input_ids)
        if past_key_values.get_seq_length() == 0:
            embeds = torch.cat([self.own.expand(len(embeds), -1, -1), embeds], dim=1)
        return self.model(inputs_embeds=embeds, past_key_values=past_key_values)


@torch.no_grad()
def test_tokens_that_nobody_counted_are_kept():
    """The cache would give later tokens positions that are four too early."""
    plain = SoftPrompt(tiny()).eval()
    model = ckv_compile.optimize(copy.deepcopy(plain), 0.5, lowering="eager")
    logits = []
    for one in (plain, model):
        cache = ckv_compile.EvictedCache()
        one(input_ids=prompt(80), past_key_values=cache)
        logits.append(one(input_ids=prompt(1), past_key_values=cache).logits)
        assert cache.get_seq_length() == cache.layers[0].held == 85
    torch.testing.assert_close(*logits)
    reasons = {row.reason for row in ckv_compile.explain(model).rejections}
    assert reasons == {"UNCOUNTED_TOKENS"}, str(ckv_compile.explain(model))
