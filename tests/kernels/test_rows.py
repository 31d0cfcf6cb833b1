"""Scores of single queries, norms of single heads and average pooling against the oracle."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOAT32_STEP, site
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ckv_compile.kernels import attention_rows, pooling, projected_norm, reference

REDUCTIONS = ["sum", "mean", "l2", "max", "drop"]
LENGTHS = st.integers(1, 24) | st.sampled_from([33, 63, 127])


@st.composite
def options(draw: st.DrawFn, site: dict[str, Any]) -> dict[str, Any]:
    """Pads on either side, a bias, sinks, a soft cap; or an encoder's keys."""
    (batch, heads, q_len, _), kv_len = site["query"].shape, site["key"].shape[2]
    generator = torch.Generator().manual_seed(kv_len)
    given: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.05]))}
    given["softcap"] = draw(st.sampled_from([None, 5.0]))
    if draw(st.booleans()):
        given["sinks"] = torch.randn(heads, generator=generator)
    if draw(st.booleans()):
        given["causal"] = False
        return given
    if draw(st.booleans()):
        at = torch.arange(kv_len)
        pads = torch.tensor([[draw(st.integers(0, kv_len - 1))] for _ in range(batch)])
        given["real"] = at >= pads if draw(st.booleans()) else at < kv_len - pads
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(1, heads, 1, kv_len), (batch, 1, q_len, kv_len)]))
        given["bias"] = torch.randn(shape, generator=generator)
    return given


@settings(deadline=None, max_examples=60)
@given(
    site(LENGTHS),
    st.data(),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([0, 1, 4, 32]),
    st.sampled_from([1, 4, None]),
    st.sampled_from([1, 5]),
)
def test_attention_rows(
    site: dict[str, Any],
    data: st.DataObject,
    reduce: str,
    window_size: int,
    asked: int | None,
    kernel_size: int,
) -> None:
    """Prevents a wrong causal edge in later pieces, a pad that is seen, a group that is mixed up,
    and scores in half precision."""
    kv_len = site["key"].shape[2]
    site["query"] = site["query"][:, :, data.draw(st.integers(0, kv_len - 1)) :]
    given = data.draw(options(site))
    value = site["value"] if reduce == "drop" else None
    scale = given.pop("scale")
    tensors = (site["query"], site["key"], value, scale, window_size, asked)
    actual = attention_rows.attention_rows(*tensors, reduce, kernel_size, **given)
    expected = reference.attention_rows(*tensors, reduce, kernel_size, **given)
    assert (actual.dtype, actual.shape) == (torch.float32, (*site["query"].shape[:2], kv_len))
    # A logit is off by some rounding steps of its terms; exp makes that a relative error.
    widest = site["query"].float().norm(dim=-1).max() * site["key"].float().norm(dim=-1).max()
    factor = site["query"].shape[-1] ** -0.5 if scale is None else scale
    tolerance = 32 * FLOAT32_STEP * (8 + float(widest) * factor)
    allowed = tolerance * expected.abs() + 1e-30
    if reduce == "drop":
        # Of an entry that has almost all attention little is left to divide by.
        rest = 1 - reference.attention_rows(*tensors, "max", 1, **given)
        allowed += tolerance * site["value"].float().norm(dim=-1).max() / rest.clamp(FLOAT32_STEP)
    assert ((actual - expected).abs() <= allowed).all()


@settings(deadline=None, max_examples=30)
@given(site(LENGTHS), st.data(), st.sampled_from([1, 4, 32]))
def test_the_oracle_of_rows_is_that_of_the_window(
    site: dict[str, Any], data: st.DataObject, window_size: int
) -> None:
    """Prevents an oracle that treats pads, biases, sinks, caps or encoders in a way of its own."""
    given = data.draw(options(site))
    query, key = site["query"], site["key"]
    causal, scale = given.pop("causal", True), given.pop("scale")
    rows = reference.attention_rows(
        query, key, None, scale, window_size, window_size, "mean", causal=causal, **given
    )
    mean = rows.unflatten(1, (key.shape[1], -1)).mean(2)
    window = reference.window_attention if causal else reference.cross_attention
    expected = window(query, key, scale, window_size, 1, **given)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("asked", [4, None])
def test_attention_rows_in_blocks(reduce: str, asked: int | None) -> None:
    """Prevents a block whose edge, bias or count is another's: here each query is one."""
    query, key, value = (
        2 * torch.randn(2, 4, 21, 8),
        torch.randn(2, 2, 21, 8),
        torch.randn(2, 2, 21, 8),
    )
    real = torch.arange(21) >= torch.tensor([[0], [5]])
    operands = (query, key, value if reduce == "drop" else None, None, 4, asked, reduce, 3)
    for extra in ({}, {"real": real}, {"bias": torch.randn(1, 4, 21, 21)}, {"causal": False}):
        with mock.patch.object(attention_rows, "_BLOCK_BYTES", 0):
            actual = attention_rows.attention_rows(*operands, **extra)
        expected = reference.attention_rows(*operands, **extra)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(site(LENGTHS), st.sampled_from(["l1", "l2", "value"]))
def test_projected_norms(site: dict[str, Any], norm: str) -> None:
    """Prevents a head that is seen through another head's part of the projection."""
    value, weight, heads = site["value"], site["weight"], site["query"].shape[1]
    kv_heads = value.shape[1]
    actual = projected_norm.projected_norms(value, weight, site["in_out"], heads, norm)
    # Each head as a KV head of its own: nothing is left to be averaged.
    alone = value.repeat_interleave(heads // kv_heads, 1)
    expected = reference.projected_norm(alone, weight, site["in_out"], heads, norm)
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    terms = alone.float().norm(dim=-1) * (1 if norm == "value" else weight.float().norm())
    step = FLOAT32_STEP**0.5 if norm == "l2" else 16 * FLOAT32_STEP
    assert ((actual - expected).abs() <= step * (expected + terms)).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.sampled_from([1, 3, 7]), st.data())
def test_average_pooled(kv_len: int, kernel_size: int, data: st.DataObject) -> None:
    """Prevents a mean that counts the window, pads, or what lies beyond the ends."""
    start = data.draw(st.integers(0, kv_len - 1))
    end = data.draw(st.integers(start, kv_len))
    at = torch.arange(kv_len)
    scores = torch.rand(1, 2, kv_len)
    actual = pooling.average_pooled(scores, ((at >= start) & (at < end))[None, None], kernel_size)
    for i in range(kv_len):
        low, high = max(i - kernel_size // 2, start), min(i + kernel_size // 2 + 1, end)
        expected = scores[:, :, low:high].mean(-1) if start <= i < end else torch.zeros(1, 2)
        torch.testing.assert_close(actual[:, :, i], expected)


def test_lengths_stay_symbolic() -> None:
    """Prevents one graph for each prompt length: a pool or an op that fixes it."""

    def scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = attention_rows.attention_rows(query, key, value, None, 4, None, "drop")
        prefix = torch.arange(key.shape[2]) < key.shape[2] - 4
        return pooling.average_pooled(rows, prefix[None, None], 5)

    def tensors(kv_len: int) -> tuple[Tensor, ...]:
        return (
            torch.randn(2, 4, kv_len, 8),
            torch.randn(2, 2, kv_len, 8),
            torch.randn(2, 2, kv_len, 6),
        )

    traced = make_fx(scores, tracing_mode="symbolic")(*tensors(20))
    for kv_len in (20, 21, 70):
        given = tensors(kv_len)
        assert torch.equal(traced(*given), scores(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_keeps_its_promises(dtype: torch.dtype) -> None:
    """Prevents a fake kernel that lies about shape or dtype, and an op that writes its inputs."""
    query, key = torch.randn(2, 4, 20, 8, dtype=dtype), torch.randn(2, 2, 20, 8, dtype=dtype)
    for value, reduce in ((None, "mean"), (torch.randn(2, 2, 20, 6, dtype=dtype), "drop")):
        torch.library.opcheck(
            torch.ops.ckv_compile.attention_rows.default,
            (query, key, value, 0.3, 4, None, reduce, 1, None, None, None, None, True),
            test_utils=("test_schema", "test_faketensor"),
        )
