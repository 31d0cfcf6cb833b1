"""Biases, sinks and masks of eager attention: what is read, and what must not be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture import BATCH, HEAD_DIM, HEADS, Q_LEN, attention, captured, qkv, weight

from ckv_compile.config import EvictionConfig
from ckv_compile.passes.match import match_sites
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.site import Reason

LOW = torch.finfo(torch.float32).min


def match(sdpa, *more, dynamic=True):
    def forward(q, k, v, w, *more):
        return attention(sdpa=lambda q, k, v: sdpa(q, k, v, *more))(q, k, v, w)

    return match_sites(captured(forward, *qkv(), weight(), *more, dynamic=dynamic))


def seen(q, k):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def alibi(k):
    return torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None] * torch.arange(k.shape[2])


def scores(q, k):
    return q @ k.transpose(-1, -2) * 0.25


def added(q, k):
    return torch.where(seen(q, k), 0.0, LOW)


def by_sdpa(mask):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q, k))


def by_softmax(logits):
    return lambda q, k, v: logits(q, k).softmax(-1) @ v


def merged(x):
    return x.reshape(-1, *x.shape[2:])


def bloom(q, k, v):
    bias = alibi(k).repeat(BATCH, 1, 1)
    logits = bias.baddbmm(merged(q), merged(k).transpose(-1, -2), beta=1.0, alpha=0.25)
    logits = logits.view(BATCH, HEADS, q.shape[2], -1) + added(q, k)
    weights = logits.softmax(-1).view(BATCH * HEADS, q.shape[2], -1)
    return torch.bmm(weights, merged(v)).view(BATCH, HEADS, q.shape[2], HEAD_DIM)


def three_dimensional(q, k, v):
    logits = torch.bmm(merged(q), merged(k).transpose(1, 2))
    logits = logits.view(BATCH, HEADS, q.shape[2], k.shape[2]) + added(q, k)
    logits = torch.max(logits, torch.full((), LOW)).view(BATCH * HEADS, q.shape[2], k.shape[2])
    out = torch.bmm(logits.softmax(-1), merged(v))
    return out.view(BATCH, HEADS, q.shape[2], HEAD_DIM)


BIASED = {
    "added to SDPA's mask": (by_sdpa(lambda q, k: alibi(k) + added(q, k)), 1),
    "where the mask lets through": (
        by_sdpa(lambda q, k: torch.where(seen(q, k), alibi(k)[None], LOW)),
        1,
    ),
    "two of them": (by_softmax(lambda q, k: scores(q, k) + alibi(k) + (alibi(k) + added(q, k))), 2),
    "behind the soft cap": (
        by_softmax(lambda q, k: 5 * (scores(q, k) / 5).tanh() + alibi(k) + added(q, k)),
        1,
    ),
    "masked_fill": (
        by_softmax(lambda q, k: (scores(q, k) + alibi(k)).masked_fill(~seen(q, k), LOW).float()),
        1,
    ),
    "bmm": (bloom, 1),
    "no bias, three dimensions": (three_dimensional, 0),
    "no bias, where": (
        by_softmax(lambda q, k: torch.where(seen(q, k), scores(q, k), torch.tensor(LOW))),
        0,
    ),
    "no bias, an added mask as a condition": (
        by_softmax(lambda q, k: scores(q, k).masked_fill(added(q, k).to(torch.bool), LOW)),
        0,
    ),
    "zeros": (by_sdpa(lambda q, k: torch.zeros(1, 1, 1, 1) + added(q, k)), 0),
    "its own maximum taken off": (
        by_softmax(lambda q, k: (x := scores(q, k) + added(q, k)) - x.max(-1, keepdim=True).values),
        0,
    ),
}


@pytest.mark.parametrize(("sdpa", "count"), BIASED.values(), ids=BIASED)
def test_biases_are_told_from_masks(sdpa, count):
    """A bias that is left out scores another attention; a mask that is taken for one as well."""
    sites, rejections = match(sdpa)
    assert rejections == ()
    (site,) = sites
    assert len(site.biases) == count
    assert site.mask_kind == ("causal tensor, biased" if count else "causal tensor")


REFUSED = {
    "no mask beside it": (by_sdpa(lambda q, k: alibi(k)[None]), Reason.MASK_UNREADABLE),
    "scaled afterwards": (
        by_softmax(lambda q, k: (scores(q, k) + alibi(k) + added(q, k)) * 0.5),
        Reason.MASK_UNREADABLE,
    ),
    "under the soft cap": (
        by_softmax(lambda q, k: 5 * ((scores(q, k) + alibi(k)) / 5).tanh() + added(q, k)),
        Reason.MASK_UNREADABLE,
    ),
    "a condition the wrong way round": (
        by_softmax(lambda q, k: scores(q, k).masked_fill(seen(q, k), LOW)),
        Reason.MASK_UNREADABLE,
    ),
    "where, the wrong way round": (
        by_softmax(lambda q, k: torch.where(~seen(q, k), scores(q, k), torch.tensor(LOW))),
        Reason.MASK_UNREADABLE,
    ),
    "a small penalty": (
        by_softmax(lambda q, k: scores(q, k).masked_fill(~seen(q, k), -3.0)),
        Reason.ATTENTION_UNREADABLE,
    ),
    "beta": (
        lambda q, k, v: (
            (
                torch.baddbmm(
                    alibi(k).repeat(BATCH, 1, 1), merged(q), merged(k).transpose(1, 2), beta=2.0
                ).view(BATCH, HEADS, q.shape[2], -1)
                + added(q, k)
            ).softmax(-1)
            @ v
        ),
        Reason.ATTENTION_UNREADABLE,
    ),
    "batch and heads exchanged": (
        lambda q, k, v: (
            torch.bmm(
                q.transpose(0, 1).reshape(-1, *q.shape[2:]),
                k.transpose(0, 1).reshape(-1, *k.shape[2:]).transpose(1, 2),
            )
            .softmax(-1)
            .bmm(merged(v))
            .view(BATCH, HEADS, q.shape[2], HEAD_DIM)
        ),
        Reason.OUTPUT_AXES,
    ),
    "the maximum of another row": (
        by_softmax(lambda q, k: (x := scores(q, k) + added(q, k)) - x.max(-2, keepdim=True).values),
        Reason.ATTENTION_UNREADABLE,
    ),
}


@pytest.mark.parametrize(("sdpa", "reason"), REFUSED.values(), ids=REFUSED)
def test_look_alikes_are_refused(sdpa, reason):
    sites, rejections = match(sdpa)
    assert sites == () and [r.reason for r in rejections] == [reason]


def test_a_bias_from_outside_is_refused():
    """It may hide pads, and nobody could compute it for tokens that are gone."""

    def sdpa(q, k, v, bias):
        return (scores(q, k) + bias + added(q, k)).softmax(-1) @ v

    sites, rejections = match(sdpa, torch.zeros(Q_LEN), dynamic=False)
    assert sites == () and [r.reason for r in rejections] == [Reason.BIAS_UNREADABLE]


def with_sinks(logits, sinks, drop=slice(None, -1)):
    column = sinks.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], -1)
    return torch.cat([logits, column], -1).softmax(-1)[..., drop]


def test_sinks_are_read():
    """GPT-OSS: one more logit for each head, dropped behind the softmax."""

    def sdpa(q, k, v, sinks):
        return with_sinks(scores(q, k) + added(q, k), sinks) @ v

    sites, rejections = match(sdpa, torch.zeros(HEADS))
    assert rejections == ()
    (site,) = sites
    assert tuple(site.sinks.meta["example_value"].shape) == (HEADS,)


@pytest.mark.parametrize("kind", ["shared", "by position", "first dropped", "not dropped"])
def test_other_columns_are_no_sinks(kind):
    """Whatever else stands beside the keys is not one logit for each head."""
    sinks = {"shared": torch.zeros(1), "by position": torch.zeros(Q_LEN)}.get(
        kind, torch.zeros(HEADS)
    )

    def sdpa(q, k, v, sinks):
        logits = scores(q, k) + added(q, k)
        if kind == "by position":
            column = sinks.reshape(1, 1, -1, 1).expand(BATCH, HEADS, -1, -1)
            return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v
        if kind == "shared":
            column = sinks.expand(BATCH, HEADS, q.shape[2], 1)
            return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v
        drop = slice(1, None) if kind == "first dropped" else slice(None)
        weights = with_sinks(logits, sinks, drop)
        return weights @ (F.pad(v, (0, 0, 0, 1)) if kind == "not dropped" else v)

    sites, rejections = match(sdpa, sinks, dynamic=False)
    assert sites == () and all(r.reason is Reason.ATTENTION_UNREADABLE for r in rejections)


def test_without_a_cache_that_keeps_positions_nothing_is_cut():
    """A plain cache does not know where its entries stood: later biases would be wrong."""
    graph = captured(attention(sdpa=BIASED["masked_fill"][0]), *qkv(), weight())
    found = rewrite(graph, EvictionConfig(budget=0.5, window_size=2))
    assert found.sites == () and found.inserted == ()
    assert [r.reason for r in found.rejections] == [Reason.BIAS_UNREADABLE]
