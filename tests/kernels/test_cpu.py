"""C++ on the CPU: a selection that makes few norms, and what runs where there is no compiler."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SETTINGS, site
from torch import Tensor

from ckv_compile.kernels import projected_norm, select, window_attention
from ckv_compile.kernels.cpu import projected_norm as cpu_norm
from ckv_compile.kernels.cpu import window_attention as cpu_window
from ckv_compile.kernels.projected_norm import UnmadeNorm

MODULES = (cpu_norm, cpu_window)


def base_of(value: Tensor, seed: int, levels: int) -> Tensor:
    """``[B, Hkv, K]``, heavy-tailed as attention is; with few levels many are equal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(value.shape[:3], generator=generator).pow(8)
    return (drawn * levels).floor() / levels


@SETTINGS
@given(
    site(),
    st.data(),
    st.sampled_from([2, 1 << 20]),
    st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    st.sampled_from([1, 4, 32]),
    st.booleans(),
)
def test_a_norm_that_is_not_made_selects_the_same(
    site: dict[str, Any],
    data: st.DataObject,
    levels: int,
    ratio: float,
    window_size: int,
    padded: bool,
) -> None:
    """A bound that was too low would drop an entry that belongs to the best."""
    value, heads = site["value"], site["query"].shape[1]
    batch, _, kv_len, _ = value.shape
    budget = data.draw(st.integers(1, kv_len))
    base = base_of(value, data.draw(st.integers(0, 99)), levels)
    real = row_budgets = None
    if padded:
        lengths = torch.tensor([data.draw(st.integers(1, kv_len)) for _ in range(batch)])
        real = torch.arange(kv_len) >= kv_len - lengths[:, None]
        row_budgets = lengths.clamp(max=budget)
    options = (budget, window_size, ratio, 1e-4, real, row_budgets)
    unmade = UnmadeNorm(value, site["weight"], site["in_out"], heads, "l1", False)
    expected = select.select(base, unmade.made(), *options)
    assert torch.equal(select.select(base, unmade, *options), expected)


def wide(spoil: float | None = None) -> tuple[Tensor, UnmadeNorm]:
    """Attention of many entries, and norms of two kinds of heads; one value may be spoilt."""
    value = torch.randn(1, 2, 900, 16)
    if spoil is not None:
        value[0, 0, 40] = spoil
        value[0, 1, 41, 3] = spoil
    weight = torch.randn(64, 64)
    weight[:, :16] = weight[:, :1]  # of rank one: almost nothing is left of many values
    return base_of(value, 1, 1 << 20), UnmadeNorm(value, weight, False, 4, "l1", False)


@pytest.mark.parametrize("spoil", [None, float("nan"), float("inf"), 1e30])
def test_hostile_values_select_the_same(spoil: float | None) -> None:
    base, unmade = wide(spoil)
    for budget in (40, 300, 899):
        options = (budget, 8, 0.5, 1e-4)
        expected = select.select(base, unmade.made(), *options)
        assert torch.equal(select.select(base, unmade, *options), expected)


def test_negative_attention_selects_the_same() -> None:
    """A method of a user's may score so; the lowest norm is then the best."""
    base, unmade = wide()
    options = (100, 8, 0.5, 1e-4)
    expected = select.select(base - 0.5, unmade.made(), *options)
    assert torch.equal(select.select(base - 0.5, unmade, *options), expected)


def test_few_norms_are_made() -> None:
    base, unmade = wide()
    made = []

    def counted(*args: Any) -> Tensor:
        made.append(0 if args[4] else int(args[6].sum()))
        return norms(*args)

    norms = cpu_norm.norms
    with mock.patch.object(cpu_norm, "norms", counted):
        select.select(base, unmade, 90, 8, 0.5, 1e-4)
    assert 0 < sum(made) < 2 * 900 / 4


@SETTINGS
@given(site(), st.sampled_from(["l1", "l2"]), st.sampled_from([None, 5.0]))
def test_library_calls_give_the_same_without_a_compiler(
    site: dict[str, Any], norm: str, softcap: float | None
) -> None:
    value, heads = site["value"], site["query"].shape[1]

    def made() -> tuple[Tensor, Tensor]:
        norms = projected_norm.projected_norm(value, site["weight"], site["in_out"], heads, norm)
        options = (None, 4, 3, softcap)
        return norms, window_attention.window_attention(site["query"], site["key"], *options)

    expected = made()
    unmade = UnmadeNorm(value, site["weight"], site["in_out"], heads, "l1", False)
    base, options = base_of(value, 0, 1 << 20), ((value.shape[2] + 1) // 2, 1, 0.5, 1e-4)
    without = (mock.patch.object(module, "library", lambda *_: None) for module in MODULES)
    with contextlib.ExitStack() as stack:
        for patch in without:
            stack.enter_context(patch)
        assert not cpu_norm.takes(value, site["weight"])
        for one, other in zip(made(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
        right = select.select(base, unmade.made(), *options)
        assert torch.equal(select.select(base, unmade, *options), right)
