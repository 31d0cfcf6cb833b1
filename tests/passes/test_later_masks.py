"""Masks of a prompt's later pieces: causal behind what is held, padding behind what is gone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture import captured, weight

from ckv_compile.config import EvictionConfig
from ckv_compile.passes.pipeline import rewrite

HELD, Q_LEN, EVICTED = 8, 12, 5
WEIGHT = weight()
KV_LEN = HELD + Q_LEN


def found_with(mask_of, marked=None, padding=None, evicted=EVICTED, q_len=Q_LEN):
    """What the passes find in a piece of 12 tokens behind 8 entries, 5 of 13 being gone."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, q_len, 16), (2, 4, Q_LEN, 16), (2, 4, HELD, 16)]
    query, new, past = (torch.randn(*shape, generator=generator) for shape in shapes)
    tokens, gap = torch.zeros(2, marked or Q_LEN).long(), torch.empty(evicted + 2, 0)
    budgets = None if padding is None else torch.tensor([9, 9])

    def forward():
        torch.ops.ckv_compile.capacity(torch.empty(9), tokens, padding, budgets, gap)
        key, value = (torch.cat([past, new * i], dim=2) for i in (1, 2))
        keys = torch.arange(KV_LEN) + EVICTED
        queries = torch.arange(q_len) + HELD + EVICTED
        mask = mask_of(keys[None, None, None, :], queries[None, None, :, None])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.linear(out.transpose(1, 2).reshape(2, -1, 64), WEIGHT), key, value

    return rewrite(captured(forward), EvictionConfig(budget=9, window_size=3))


def causal(keys, queries):
    return keys <= queries


def test_causal_behind_what_is_held_is_cut():
    found = found_with(causal)
    assert len(found.inserted) == 1 and found.rejections == ()
    assert found.sites[0].phase == "continuation" and found.sites[0].mask_kind == "causal tensor"


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda k, q: k <= q + 1,
        lambda k, q: k + 1 <= q,
        lambda k, q: k - EVICTED <= q,
        lambda k, q: (k <= q) & (k <= q + 1),
    ],
)
def test_another_shift_is_not_causal(mask_of):
    """One position off is another attention; the scores would be those of another model."""
    found = found_with(mask_of)
    assert found.inserted == () and {r.reason.name for r in found.rejections} == {"MASK_UNREADABLE"}


def test_no_mask_in_a_later_piece_is_refused():
    """SDPA aligns is_causal with the first key: here that would hide what is held."""
    found = found_with(lambda k, q: None)
    assert {r.reason.name for r in found.rejections} == {"NOT_CAUSAL"}


def padded(offset):
    def mask_of(keys, queries):
        rows = torch.arange(2)[:, None, None, None]
        columns = (torch.arange(KV_LEN) + offset)[None, None, None, :]
        return (keys <= queries) & PADDING[rows, columns]

    return mask_of


PADDING = torch.ones(2, EVICTED + KV_LEN, dtype=torch.bool)


def test_padding_is_read_behind_what_is_gone():
    found = found_with(padded(EVICTED), padding=PADDING)
    assert len(found.inserted) == 1 and found.rejections == ()
    assert found.sites[0].mask_kind == "causal, padded"


@pytest.mark.parametrize("wrong", ["columns", "gap", "tokens", "mask"])
def test_padding_counted_elsewhere_is_refused(wrong):
    """Columns of other tokens, or rows counted on another prompt, keep the wrong entries."""
    found = found_with(
        padded(0 if wrong == "columns" else EVICTED),
        padding=PADDING.clone() if wrong == "mask" else PADDING,
        evicted=3 if wrong == "gap" else EVICTED,
        marked=Q_LEN - 1 if wrong == "tokens" else Q_LEN,
    )
    assert found.inserted == () and {r.reason.name for r in found.rejections} == {"PADDING_MASK"}


def test_a_plain_later_call_is_not_cut():
    """Without a plan for it a second turn keeps what it brings, whatever its mask.

    But a mask that is not read may compare positions with slots, of which a cut leaves fewer.
    """

    hidden = torch.rand(Q_LEN, KV_LEN) > 0.5
    new, past = torch.randn(2, 4, Q_LEN, 16), torch.randn(2, 4, HELD, 16)

    def forward():
        key = torch.cat([past, new], dim=2)
        value = key * 2
        out = F.scaled_dot_product_attention(new, key, value, attn_mask=hidden)
        return F.linear(out.transpose(1, 2).reshape(2, -1, 64), WEIGHT), key, value

    found = rewrite(captured(forward), EvictionConfig(budget=9, window_size=3))
    assert found.inserted == () and {r.reason.name for r in found.rejections} == {"POSITIONS"}
