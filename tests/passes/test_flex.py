"""``flex_attention``: the functions that are read, and all others refused."""

from __future__ import annotations

import capture
import pytest
import torch
from capture import HEADS, KV_HEADS, Q_LEN, attention, captured, qkv
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ckv_compile.passes.match import match_sites
from ckv_compile.site import Reason

PADDING = torch.ones(2, Q_LEN, dtype=torch.bool)


def causal(b, h, q, k):
    return q >= k


def flex(mask_mod=causal, **options):
    def sdpa(q, k, v):
        mask = None
        if mask_mod is not None:
            mask = create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], q.device)
        return flex_attention(q, k, v, block_mask=mask, **options)

    return sdpa


def match(sdpa, *, kv_heads=HEADS, dynamic=False, **parts):
    args = (*qkv(kv_heads), capture.weight())
    return match_sites(captured(attention(sdpa=sdpa, **parts), *args, dynamic=dynamic))


CAUSAL = {
    "q >= k": causal,
    "k <= q": lambda b, h, q, k: k <= q,
    "shifted alike": lambda b, h, q, k: q + 3 >= k + 3,
    "by a difference": lambda b, h, q, k: q - 1 >= k - 1,
    "and true": lambda b, h, q, k: (q >= k) & q.new_ones((), dtype=torch.bool),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask_mod", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_mask_mod_is_read(mask_mod, dynamic):
    (site,), rejections = match(flex(mask_mod), dynamic=dynamic)
    assert rejections == () and site.phase == "prefill"
    assert (site.mask_kind, site.scale, site.softcap) == ("is_causal", 0.25, None)


def test_grouped_queries_inside_flex():
    (site,), _ = match(flex(enable_gqa=True, scale=0.5), kv_heads=KV_HEADS)
    assert (site.num_key_value_groups, site.scale) == (2, 0.5)


SCORES = {
    "soft cap": (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), 0.25, 20),
    "soft cap by its inverse": (lambda s, b, h, q, k: torch.tanh(s * 0.05) * 20, 0.25, 20),
    "scaled": (lambda s, b, h, q, k: s * 2, 0.5, None),
    "scaled and capped": (lambda s, b, h, q, k: torch.tanh(s * 2 / 20) * 20, 0.5, 20),
    "hidden as well": (lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), 0.25, None),
}


@pytest.mark.parametrize(("score_mod", "scale", "softcap"), SCORES.values(), ids=SCORES)
def test_a_soft_cap_is_read(score_mod, scale, softcap):
    """Leaving it out would score another attention."""
    (site,), _ = match(flex(score_mod=score_mod))
    assert (site.scale, site.softcap) == (scale, softcap)


def test_a_causal_score_mod_needs_no_mask():
    hides = SCORES["hidden as well"][0]
    (site,), _ = match(flex(None, score_mod=hides))
    assert site.mask_kind == "is_causal"


MASKS = {
    "anti-causal": lambda b, h, q, k: q <= k,
    "strict": lambda b, h, q, k: q > k,
    "shifted": lambda b, h, q, k: q + 2 >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 4),
    "prefix": lambda b, h, q, k: (q >= k) | (k < 4),
    "by heads": lambda b, h, q, k: (q >= k) & (h > 1),
    "padded": lambda b, h, q, k: (q >= k) & PADDING[b, k],
    "queries twice": lambda b, h, q, k: q >= q,
    "scaled": lambda b, h, q, k: q >= 2 * k,
}


@pytest.mark.parametrize("mask_mod", MASKS.values(), ids=MASKS)
def test_other_mask_mods_are_refused(mask_mod):
    sites, (rejection,) = match(flex(mask_mod))
    assert sites == () and rejection.reason is Reason.MASK_UNREADABLE


MODS = {
    "bias": lambda s, b, h, q, k: s + (k - q),
    "by heads": lambda s, b, h, q, k: s * h,
    "cap of another size": lambda s, b, h, q, k: 10 * torch.tanh(s / 20),
    "cap of the hidden": lambda s, b, h, q, k: (
        torch.tanh(torch.where(q >= k, s, -float("inf")) / 20) * 20
    ),
    "hidden by little": lambda s, b, h, q, k: torch.where(q >= k, s, -1.0),
    "another mask": lambda s, b, h, q, k: torch.where(q + 1 >= k, s, -float("inf")),
    "capped twice": lambda s, b, h, q, k: 20 * torch.tanh(20 * torch.tanh(s / 20) / 20),
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s),
    "constant": lambda s, b, h, q, k: s * 0 + 1,
}


@pytest.mark.parametrize("score_mod", MODS.values(), ids=MODS)
def test_other_score_mods_are_refused(score_mod):
    sites, (rejection,) = match(flex(score_mod=score_mod))
    assert sites == () and rejection.reason is Reason.MASK_UNREADABLE


def test_without_a_mask_every_query_sees_every_key():
    sites, (rejection,) = match(flex(None))
    assert sites == () and rejection.reason is Reason.NOT_CAUSAL


def test_a_gate_made_of_the_log_sum_exp_is_refused():
    """It is made of the attention itself; it looked like a factor from elsewhere."""

    def sdpa(q, k, v):
        mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], q.device)
        out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
        return out * lse.sigmoid()[..., None].expand_as(out)

    sites, (rejection,) = match(sdpa)
    assert sites == () and rejection.reason is Reason.ATTENTION_UNREADABLE


def test_a_log_sum_exp_that_nobody_reads_does_no_harm():
    def sdpa(q, k, v):
        mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], q.device)
        return flex_attention(q, k, v, block_mask=mask, return_lse=True)[0]

    (site,), _ = match(sdpa)
    assert site.mask_kind == "is_causal"
