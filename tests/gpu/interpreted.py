"""The Triton kernels against the oracle, run by its interpreter; test_interpreter.py starts it.

An interpreter takes milliseconds a tile: sizes are small, and the tiles are as on a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpu import interpreter
from gpu.codegen import Code
from gpu.nodes import NODES
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOAT32_STEP, assert_attends_alike, non_contiguous, ragged, site
from torch import Tensor

from ckv_compile.kernels import (
    compact,
    projected_norm,
    ragged_attention,
    reference,
    reference_packed,
    select,
    window_attention,
)

SETTINGS = settings(deadline=None, max_examples=int(os.environ["CKV_EXAMPLES"]))
LENGTHS = st.integers(1, 40) | st.sampled_from([31, 32, 33, 63, 65, 129])
RATIOS = st.sampled_from([0.0, 0.29, 0.5, 1.0])


@pytest.fixture(autouse=True, scope="module")
def _nothing_unwritten() -> Iterator[None]:
    """New memory is NaN or a huge number: who reads what no kernel wrote gets that."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@triton.jit
def _arithmetic_kernel(a, b, sums, products, quotients, dots, size: tl.constexpr):
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    at = row * size + column
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(sums + at, x + y)
    tl.store(products + at, x * y)
    tl.store(quotients + at, x / y)
    tl.store(dots + at, tl.dot(x, y))


def test_the_interpreter_computes_in_bfloat16() -> None:
    """Prevents the tests below from passing or failing for arithmetic that no GPU does."""
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    results = [torch.empty_like(a) for _ in range(4)]
    _arithmetic_kernel[(1,)](a, b, *results, size=16)
    expected = (a + b, a * b, a / b, (a.float() @ b.float()).bfloat16())
    for actual, right in zip(results, expected, strict=True):
        assert torch.equal(actual, right)


@triton.jit
def _copy_kernel(source, target, count, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(target + at, tl.load(source + at), mask=at < count)


def test_the_interpreter_sees_an_access_outside() -> None:
    """Prevents a missing mask from passing: memory behind a tensor can be read in most cases."""
    whole, part = torch.zeros(8), torch.zeros(7)
    _copy_kernel[(1,)](whole, part, 7, block=8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="of no tensor"):
        _copy_kernel[(1,)](part, whole, 7, block=8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="of no tensor"):
        _copy_kernel[(1,)](whole, part, 8, block=8)


@SETTINGS
@given(site(LENGTHS), st.sampled_from(["l1", "l2"]))
def test_projected_norm(site: dict[str, Any], norm: str) -> None:
    """Prevents a tile's edge from being added or left out, and a group that takes another's W."""
    value, weight, heads = site["value"], site["weight"], site["query"].shape[1]
    actual = projected_norm.projected_norm(value, weight, site["in_out"], heads, norm, triton=True)
    expected = reference.projected_norm(value, weight, site["in_out"], heads, norm)
    assert (actual.dtype, actual.shape) == (torch.float32, value.shape[:3])
    terms = value.float().norm(dim=-1) * weight.float().norm()
    # Of L2 it is the square that is summed, so its error is the root of a rounding step.
    step = FLOAT32_STEP**0.5 if norm == "l2" else 16 * FLOAT32_STEP
    assert ((actual - expected).abs() <= step * (expected + terms)).all()
    assert (actual[(value == 0).all(-1)] == 0).all()


def test_projected_norm_of_a_wide_layer() -> None:
    """Prevents columns behind the first tiles from being left out."""
    value, weight = torch.randn(1, 1, 70, 24).half(), torch.randn(200, 48).half()
    actual = projected_norm.projected_norm(value, weight, False, 2, "l1", triton=True)
    expected = reference.projected_norm(value, weight, False, 2, "l1")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@st.composite
def masks(draw: st.DrawFn, batch: int, kv_len: int, holes: bool) -> Tensor | None:
    """``real``: spans, nothing but pads or, if ``holes``, pads anywhere; None for no pads."""
    kind = draw(st.sampled_from(["none", "spans", "holes"] if holes else ["none", "spans"]))
    if kind == "none":
        return None
    if kind == "holes":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
        return torch.rand(batch, kv_len, generator=generator) < 0.8
    spans = [sorted(draw(st.tuples(*[st.integers(0, kv_len)] * 2))) for _ in range(batch)]
    positions = torch.arange(kv_len)
    return torch.stack([(positions >= low) & (positions < high) for low, high in spans])


@st.composite
def biases(draw: st.DrawFn, query: Tensor, kv_len: int) -> Tensor | None:
    """``[B or 1, H or 1, Q or 1, K or 1]`` of any dtype and strides, or None."""
    if draw(st.booleans()):
        return None
    shape = [draw(st.sampled_from([size, 1])) for size in (*query.shape[:3], kv_len)]
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    bias = bias.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return bias.expand(-1, query.shape[1], -1, -1) if draw(st.booleans()) else bias


@SETTINGS
@given(
    site(LENGTHS),
    st.data(),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from([1, 4, 20]),
    st.sampled_from([1, 3, 7]),
    st.sampled_from([None, 5.0]),
    st.booleans(),
)
def test_window_attention(
    site: dict[str, Any],
    data: st.DataObject,
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
    sunk: bool,
) -> None:
    """Prevents what a tile hides or shows too much: pads, the future, the window, other tiles."""
    key, kv_len = site["key"], site["key"].shape[2]
    query = site["query"][:, :, kv_len - data.draw(st.integers(1, kv_len), label="q_len") :]
    # The twins pool over neighbours in the cache, the oracle over a row's own.
    real = data.draw(masks(len(key), kv_len, holes=kernel_size == 1), label="real")
    bias = data.draw(biases(query, kv_len), label="bias")
    sinks = torch.linspace(-4.0, 6.0, query.shape[1]) if sunk else None
    options = (query, key, scale, window_size, kernel_size, softcap, real, bias, sinks)
    actual = window_attention.window_attention(*options, triton=True)
    assert (actual.dtype, actual.shape) == (torch.float32, key.shape[:3])
    assert actual.isfinite().all()
    expected = reference.window_attention(*options)
    # A logit is off by some rounding steps of its terms; exp makes that a relative error.
    widest = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    tolerance = 32 * FLOAT32_STEP * (16 + float(widest) * factor)
    for b in range(len(key)):
        # Below nothing is scored; the result only has to be finite.
        if (kv_len if real is None else int(real[b].sum())) > window_size:
            torch.testing.assert_close(actual[b], expected[b], rtol=tolerance, atol=1e-30)


@SETTINGS
@given(site(LENGTHS), LENGTHS, st.sampled_from([1, 4, 20]), st.booleans())
def test_cross_attention(site: dict[str, Any], kv_len: int, window_size: int, sunk: bool) -> None:
    """Prevents a causal mask where K is an encoder's, and a window longer than the queries."""
    query, key = site["query"], site["key"]
    key = key.repeat(1, 1, -(-kv_len // key.shape[2]), 1)[:, :, :kv_len]
    sinks = torch.linspace(-4.0, 6.0, query.shape[1]) if sunk else None
    options = (query, key, 0.2, window_size, 3, None, sinks)
    actual = window_attention.cross_attention(*options, triton=True)
    widest = float(query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max())
    tolerance = 32 * FLOAT32_STEP * (16 + widest * 0.2)
    expected = reference.cross_attention(*options)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30)


@st.composite
def scores(draw: st.DrawFn, batch: int, heads: int, kv_len: int) -> Tensor:
    """``[B, Hkv, K]``: many ties or all apart; huge, negative, of either zero; strided."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    levels = draw(st.sampled_from([1, 2, 5, 1 << 22]))
    drawn = torch.randint(0, levels, (batch, heads, kv_len), generator=generator)
    drawn = drawn.float() / levels - draw(st.sampled_from([0.0, 0.4]))
    odd = st.sampled_from([3e38, -3e38, -0.0, 1e-45, -1e-45])
    for at in draw(st.lists(st.integers(0, kv_len - 1), max_size=2)):
        drawn[:, :, at] = draw(odd)
    return drawn.transpose(0, 2).contiguous().transpose(0, 2) if draw(st.booleans()) else drawn


def _assert_selects(data: st.DataObject, kv_len: int, window_size: int, ratio: float) -> None:
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    base, norm = (data.draw(scores(batch, heads, kv_len)) for _ in range(2))
    real = data.draw(masks(batch, kv_len, holes=True), label="real")
    budget = data.draw(st.integers(1, kv_len), label="budget")
    row_budgets = None
    if real is not None:
        most = [min(int(count), budget) for count in real.sum(-1)]
        row_budgets = torch.tensor([data.draw(st.integers(0, count)) for count in most])
    for norms in (norm, None):
        options = (base, norms, budget, window_size, ratio, 1e-4, real, row_budgets)
        assert torch.equal(select.select(*options, triton=True), reference.select(*options))


@SETTINGS
@given(st.data(), LENGTHS, st.sampled_from([1, 4, 32]), RATIOS)
def test_select(data: st.DataObject, kv_len: int, window_size: int, ratio: float) -> None:
    """Prevents a tie, a sign or a pad from being ordered otherwise than the oracle does."""
    _assert_selects(data, kv_len, window_size, ratio)


@settings(SETTINGS, max_examples=max(SETTINGS.max_examples // 5, 1))
@given(st.data(), st.sampled_from([1023, 1024, 1025, 2100]), RATIOS)
def test_select_of_several_tiles(data: st.DataObject, kv_len: int, ratio: float) -> None:
    """Prevents ties from being counted in one tile alone, and slots from being written twice."""
    _assert_selects(data, kv_len, 32, ratio)


def test_select_takes_a_nan_last() -> None:
    """Prevents a broken entry from being kept while a sound one is evicted."""
    base = torch.tensor([[[torch.nan, 0.0, torch.nan, -1.0, torch.inf, -torch.inf, 0.0]]])
    for norm in (None, torch.ones(1, 1, 7), torch.full((1, 1, 7), torch.nan)):
        for budget in (2, 4):
            options = (base, norm, budget, 1, 0.5, 1e-4)
            # Which of an infinity and the largest number is larger, the twin says.
            assert torch.equal(select.select(*options, triton=True), select.select(*options))


@SETTINGS
@given(site(LENGTHS), st.data())
def test_compact(site: dict[str, Any], data: st.DataObject) -> None:
    """Prevents a kept row from another head, and a cache that shares the prompt's storage."""
    key, value = site["key"], site["value"][..., :5]
    budget = data.draw(st.integers(1, key.shape[2]), label="budget")
    keep = torch.rand(key.shape[:3]).topk(budget, dim=-1).indices.sort(-1).values
    if data.draw(st.booleans(), label="strided"):
        keep = non_contiguous(keep[..., None].expand(-1, -1, -1, 2).contiguous())[..., 0]
    actual = compact.compact(key, value, keep, triton=True)
    for cut, right, whole in zip(
        actual, reference.compact(key, value, keep), (key, value), strict=True
    ):
        assert torch.equal(cut, right)
        assert cut.dtype == whole.dtype and cut.is_contiguous()
        assert cut.untyped_storage().nbytes() == cut.numel() * cut.element_size()


@SETTINGS
@given(ragged())
def test_ragged_attention(operands: dict[str, Any]) -> None:
    """Prevents a tile of one head from reading the next one's entries, and empty heads from NaN."""
    actual = ragged_attention.ragged_attention(**operands, triton=True)
    expected = reference_packed.ragged_attention(**operands)
    assert_attends_alike(actual, expected, operands)


def _generated(name: str) -> Code:
    return Code(**json.loads(Path(os.environ["CKV_GENERATED"], f"{name}.json").read_text()))


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("kv_len", [80, 133])
def test_the_generated_graph_keeps_what_the_eager_node_keeps(name: str, kv_len: int) -> None:
    """Prevents Inductor from calling a kernel with other operands, strides or sizes than eager."""
    node, code = NODES[name], _generated(name)
    args = node.small(kv_len)
    actual = interpreter.load(code.source)(code.arguments(args))
    for cut, right in zip(actual, node.module(*args), strict=True):
        assert torch.equal(cut, right)


def test_a_wrong_kernel_is_noticed() -> None:
    """Prevents the comparison above from passing whatever the kernels compute."""
    node, code = NODES["plain"], _generated("plain")
    source = code.source.replace("tl.sum(tl.abs(product)", "tl.sum((product)")
    assert source != code.source
    args = node.small(133)
    wrong = interpreter.load(source)(code.arguments(args))
    assert not torch.equal(wrong[2], node.module(*args)[2])
