"""The twins where fewer queries than keys are there, as in a prompt's later pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference, select, window_attention
from ckv_compile.methods.evict import EvictKV

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def pieces(draw: st.DrawFn) -> dict[str, Any]:
    """Queries of the last Q of K tokens; rows with pads on both sides, of nothing but pads too."""
    batch, kv_heads, groups = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    kv_len = draw(st.integers(2, 40))
    q_len = draw(st.integers(1, kv_len))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    real = None
    if draw(st.booleans()):
        spans = [sorted(draw(st.tuples(*[st.integers(0, kv_len)] * 2))) for _ in range(batch)]
        positions = torch.arange(kv_len)
        real = torch.stack([(positions >= low) & (positions < high) for low, high in spans])
    return {
        "query": randn(batch, kv_heads * groups, q_len, 16),
        "key": randn(batch, kv_heads, kv_len, 16) * 2,
        "value": randn(batch, kv_heads, kv_len, 16),
        "weight": randn(24, kv_heads * groups * 16),
        "real": real,
    }


@SETTINGS
@given(pieces(), st.sampled_from([1, 4, 8, 32]), st.sampled_from([1, 3, 7]))
def test_window_attention(piece: dict[str, Any], window_size: int, kernel_size: int) -> None:
    """Prevents queries that are read at the positions of keys, and a mean over absent ones."""
    options = (None, window_size, kernel_size, None, piece["real"])
    actual = window_attention.window_attention(piece["query"], piece["key"], *options)
    expected = reference.window_attention(piece["query"], piece["key"], *options)
    assert actual.isfinite().all() and actual.shape == piece["key"].shape[:3]
    kv_len, real = piece["key"].shape[2], piece["real"]
    rows = torch.full((len(actual),), kv_len) if real is None else real.sum(-1)
    for b, count in enumerate(rows.tolist()):
        if count > window_size:  # below nothing is scored; the result only has to be finite
            torch.testing.assert_close(actual[b], expected[b], rtol=1e-4, atol=1e-7)


def test_fewer_queries_than_the_window_score_alone() -> None:
    """By hand: two of four window queries are there; their mean is what counts."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, 16, generator=generator) for n in (2, 9))
    actual = window_attention.window_attention(query, key, None, 4, 1)
    logits = query[0, 0] @ key[0, 0].T / 4.0
    logits[0, 8] = -torch.inf
    torch.testing.assert_close(actual[0, 0, :5], logits.softmax(-1).mean(0)[:5])
    assert not actual[0, 0, 5:].any()


@SETTINGS
@given(pieces(), st.sampled_from(["criticalkv", "snapkv"]), st.data())
def test_evict_kv(piece: dict[str, Any], method: str, data: st.DataObject) -> None:
    """The whole node behind an earlier eviction: ``padding`` counts tokens that are gone."""
    config = EvictionConfig(budget=5, window_size=4, kernel_size=3, method=method)
    kv_len, real = piece["key"].shape[2], piece["real"]
    batch = len(piece["key"])
    budget = data.draw(st.integers(1, kv_len))
    gap = data.draw(st.integers(0, 5))
    padding = row_budgets = None
    if real is not None:
        entries = real.sum(-1)
        row_budgets = torch.tensor([data.draw(st.integers(0, int(n))) for n in entries])
        budget = int(row_budgets.max())
        if budget in (0, kv_len):
            row_budgets, budget = entries, kv_len
        junk = torch.arange(gap * batch).reshape(batch, gap) % 2
        padding = torch.cat([junk, real.long()], dim=1)
    args = (piece["query"], piece["key"], piece["value"], piece["weight"])
    key, value, _ = EvictKV(config, False, False)(
        *args, None, None, torch.empty(budget), padding, row_budgets, torch.empty(gap + 2, 0)
    )
    scores = reference.window_attention(*args[:2], None, 4, 3, None, real)
    norm = reference.projected_norm(*args[2:], False, args[0].shape[1], "l1")
    keep = reference.select(
        scores, norm if method == "criticalkv" else None, budget, 4, 0.5, 1e-4, real, row_budgets
    )
    used = torch.ones(batch, budget, dtype=torch.bool)
    if row_budgets is not None and budget < kv_len:
        used = torch.arange(budget) >= budget - row_budgets[:, None]
    expected_key, expected_value = reference.compact(args[1], args[2], keep)
    for b in range(batch):  # what lies in unused slots means nothing
        assert torch.equal(key[b, :, used[b]], expected_key[b, :, used[b]])
        assert torch.equal(value[b, :, used[b]], expected_value[b, :, used[b]])


@pytest.mark.parametrize("module", [select, reference])
def test_a_budget_of_all_moves_nothing(module: Any) -> None:
    """The caller's own mask goes on hiding the pads: they must stay where they were."""
    base, real = torch.rand(2, 1, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    keep = module.select(base, base, 6, 2, 0.5, 1e-4, real, torch.tensor([3, 6]))
    assert torch.equal(keep, torch.arange(6).expand(2, 1, 6))


def test_a_row_of_pads_alone_is_no_error() -> None:
    """A left-padded row that has not begun yet; the other rows must not notice."""
    base, real = torch.rand(2, 1, 6), torch.tensor([[0] * 6, [1] * 6]).bool()
    keep = select.select(base, base, 4, 2, 0.5, 1e-4, real, torch.tensor([0, 4]))
    alone = select.select(base[1:], base[1:], 4, 2, 0.5, 1e-4)
    assert torch.equal(keep[1:], alone)
