"""C++ on the CPU: a selection that makes few norms, and what runs where there is no compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SETTINGS, site
from torch import Tensor

from ckv_compile.kernels import projected_norm, reference, select, window_attention
from ckv_compile.kernels.cpu import projected_norm as cpu_norm
from ckv_compile.kernels.cpu import select as cpu_select
from ckv_compile.kernels.cpu import window_attention as cpu_window
from ckv_compile.kernels.projected_norm import UnmadeNorm

MODULES = (cpu_norm, cpu_select, cpu_window)


def no_library(*_: Any) -> None:
    """As on a machine without a compiler."""


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
    st.sampled_from(["l1", "l2"]),
)
def test_a_norm_that_is_not_made_selects_the_same(
    site: dict[str, Any],
    data: st.DataObject,
    levels: int,
    ratio: float,
    window_size: int,
    padded: bool,
    norm: str,
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
    unmade = UnmadeNorm(value, site["weight"], site["in_out"], heads, norm, False)
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


@pytest.mark.parametrize("spoil", [None, float("nan"), float("inf"), 1e30, 1e-22])
def test_hostile_values_select_the_same(spoil: float | None) -> None:
    base, unmade = wide(spoil)
    for budget in (40, 300, 899):
        options = (budget, 8, 0.5, 1e-4)
        expected = select.select(base, unmade.made(), *options)
        assert torch.equal(select.select(base, unmade, *options), expected)


def test_tiny_values_select_the_same() -> None:
    """Their squares are zero, and so was the bound."""
    base, unmade = wide()
    tiny = dataclasses.replace(unmade, value=unmade.value * 1e-22)
    expected = select.select(base, tiny.made(), 100, 8, 0.5, 1e-4)
    assert torch.equal(select.select(base, tiny, 100, 8, 0.5, 1e-4), expected)


@pytest.mark.parametrize("groups", [7, 8, 16])
def test_of_equal_entries_the_later_one_stays_in_wide_groups(groups: int) -> None:
    """A sum over rows that adds those of one column in another order makes equals differ."""
    value, weight = torch.randn(1, 1, 1, 16).expand(1, 1, 45, 16), torch.randn(32, groups * 16)
    unmade = UnmadeNorm(value, weight, False, groups, "l1", False)
    made = unmade.made()
    assert (made == made[..., :1]).all()
    base = torch.full((1, 1, 45), 0.02)
    later = torch.arange(36, 45).expand(1, 1, -1)
    for norm in (unmade, made):
        assert torch.equal(select.select(base, norm, 9, 2, 0.5, 1e-4), later)


def test_the_callers_autocast_changes_no_norm_and_is_not_kept() -> None:
    """Seen: a matrix of norms in bfloat16, which was kept, and then read as float32."""
    value, weight = torch.randn(1, 2, 50, 16), torch.randn(64, 64)
    for norm in ("l1", "l2"):
        unmade = UnmadeNorm(value, weight, False, 4, norm, False)
        base = base_of(value, 0, 1 << 20)
        with torch.autocast("cpu", torch.bfloat16):
            made, kept = unmade.made(), select.select(base, unmade, 20, 4, 0.5, 1e-4)
        assert torch.equal(unmade.made(), made)
        assert torch.equal(select.select(base, unmade, 20, 4, 0.5, 1e-4), kept)


def test_negative_attention_selects_the_same() -> None:
    """A method of a user's may score so; the lowest norm is then the best."""
    base, unmade = wide()
    options = (100, 8, 0.5, 1e-4)
    expected = select.select(base - 0.5, unmade.made(), *options)
    assert torch.equal(select.select(base - 0.5, unmade, *options), expected)


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(2, 90), st.sampled_from([1, 8, 64]), st.booleans())
def test_no_sort_selects_what_a_sort_does(
    data: st.DataObject, batch: int, kv_len: int, window_size: int, stages: bool
) -> None:
    """Library calls where there is no compiler: ties, pads, and what is no ordinary number."""
    hostile = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1.0, 1e-42, 0.5, 0.5]
    draws = st.lists(st.sampled_from(hostile), min_size=kv_len, max_size=kv_len)
    base, scores = (
        torch.tensor([[data.draw(draws) for _ in range(2)] for _ in range(batch)]) for _ in range(2)
    )
    budget, real, row_budgets = data.draw(st.integers(1, kv_len - 1)), None, None
    if data.draw(st.booleans()):
        lengths = torch.tensor([data.draw(st.integers(0, kv_len)) for _ in range(batch)])
        real = torch.arange(kv_len) >= kv_len - lengths[:, None]
        row_budgets = lengths.clamp(max=budget)
    options = (budget, window_size, [1, 3], real, row_budgets)
    expected = select._chosen(base, scores if stages else None, *options)
    assert torch.equal(cpu_select.choose(base, scores if stages else None, *options), expected)


def test_an_infinite_key_spoils_no_other() -> None:
    """Seen: lanes without a query made NaN of it, and pooling spread that."""
    query, key = -torch.rand(1, 2, 60, 16), torch.randn(1, 1, 60, 16)
    key[0, 0, 3, 0] = float("inf")
    scores = window_attention.window_attention(query, key, None, 8, 3)
    expected = reference.window_attention(query, key, None, 8, 3)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_a_lower_precision_of_products_makes_no_other_matrix() -> None:
    """It is kept, and bounds are made of it."""
    weight, precision = torch.randn(64, 64), torch.get_float32_matmul_precision()
    expected = projected_norm.root_of(weight, False, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(projected_norm.kept_root(weight, False, 4), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("width", [5, 16, 40])
def test_the_root_of_a_weight_without_full_rank(width: int) -> None:
    """Fewer columns than the head has dimensions, and columns that say nothing new."""
    value, weight = torch.randn(1, 2, 70, 16), torch.randn(width, 64)
    weight[3:] = weight[:1]
    actual = projected_norm.projected_norm(value, weight, False, 4, "l2")
    expected = reference.projected_norm(value, weight, False, 4, "l2")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    nothing = value * 0
    assert not projected_norm.projected_norm(nothing, weight, False, 4, "l2").any()


@pytest.mark.parametrize("library", [True, False])
def test_an_infinite_value_has_no_l2_norm_in_whatever_channel(library: bool) -> None:
    """Seen: infinity or NaN, by how many rows of the root a processor's registers hold."""
    value, weight = torch.randn(1, 2, 16, 16), torch.randn(40, 64)
    value[0, 1].fill_diagonal_(float("inf"))
    with (
        contextlib.nullcontext() if library else mock.patch.object(cpu_norm, "library", no_library)
    ):
        norms = projected_norm.projected_norm(value, weight, False, 4, "l2")
    assert norms[0, 1].isnan().all() and norms[0, 0].isfinite().all()


def test_tiny_weights_bound_their_norms() -> None:
    """Seen: the root's own norm was zero, and the bounds of values it hardly sees too low."""
    base = torch.full((1, 1, 300), 0.01)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        line = torch.randn(16, generator=generator)
        value = torch.randn(1, 1, 300, 16, generator=generator)
        value -= (value @ line)[..., None] * line / (line @ line)
        unmade = UnmadeNorm(1e19 * value, line.expand(64, -1) * 1e-25, False, 1, "l1", False)
        for budget in (10, 100, 200):
            expected = select.select(base, unmade.made(), budget, 2, 0.0, 1e-4)
            assert torch.equal(select.select(base, unmade, budget, 2, 0.0, 1e-4), expected)


def test_nothing_is_scored_where_nothing_is() -> None:
    """Seen: a division by zero, which ended the process."""
    query, key = torch.randn(0, 4, 20, 8), torch.randn(0, 2, 20, 8)
    assert window_attention.window_attention(query, key, None, 4, 3).shape == (0, 2, 20)
    with pytest.raises(RuntimeError):
        window_attention.cross_attention(
            torch.randn(1, 4, 0, 8), torch.randn(1, 2, 5, 8), None, 4, 3
        )


def test_logits_that_are_made_twice_score_the_same() -> None:
    """The second pass finds those of some chunks alone: equal keys must be equal in all of them."""
    query, key = torch.randn(1, 32, 1600, 8), torch.randn(1, 2, 1600, 8)
    scores = window_attention.window_attention(query, key, None, 32, 3)
    expected = reference.window_attention(query, key, None, 32, 3)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)
    equal = key[:, :, :1].expand_as(key)
    scores = window_attention.window_attention(query, equal, None, 32, 3)[0, :, :1568]
    assert (scores == scores[:, :1]).all() and (scores > 0).all()


def test_few_norms_are_made() -> None:
    base, unmade = wide()
    assert unmade.weight is not None
    operands = (unmade.value, unmade.weight, unmade.in_out, unmade.heads)
    root = projected_norm.kept_root(*operands[1:])
    made = cpu_norm.select_bounded(base, *operands, root, 90, 8, [1, 2], 1e-4, None, None)[1]
    assert 2 * (90 - 45) <= made < 2 * 900 / 4


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
    without = (mock.patch.object(module, "library", no_library) for module in MODULES)
    with contextlib.ExitStack() as stack:
        for patch in without:
            stack.enter_context(patch)
        assert not cpu_norm.takes(value, site["weight"])
        for one, other in zip(made(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
        right = select.select(base, unmade.made(), *options)
        assert torch.equal(select.select(base, unmade, *options), right)


def test_the_libraries_leave_tiny_numbers_alone() -> None:
    """Seen: flags with which GCC links a start-up that flushes them to zero for the process."""
    script = (
        "import torch; from ckv_compile.kernels.cpu import few_queries, projected_norm, "
        "select, window_attention; x = torch.ones(1); libraries = (select._library(), "
        "projected_norm._library(x, x), few_queries._library(x.dtype), "
        "window_attention._library(x.dtype)); assert all(libraries); "
        "x = torch.full((100,), 1e-40); assert (x * 0.5 > 0).all() and 2.0**-1074 * 1.0 > 0"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
