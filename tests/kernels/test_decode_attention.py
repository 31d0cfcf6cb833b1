"""Attention of few queries over a cache against PyTorch's own in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, SETTINGS, non_contiguous
from torch import Tensor

from ckv_compile.kernels import decode_attention
from ckv_compile.kernels.cpu import few_queries as cpp

attend = torch.ops.ckv_compile.decode_attention


def expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float):
    operands = (one.double() for one in (query, key, value))
    seen = None if mask is None else mask.double()
    return F.scaled_dot_product_attention(*operands, seen, scale=scale).to(query.dtype)


def assert_alike(got: Tensor, wanted: Tensor, mask: Tensor | None = None) -> None:
    # Rounded to its dtype, both, and PyTorch's own float32 differs as much from its float64.
    step = torch.finfo(got.dtype).eps
    if mask is not None and (mask == torch.finfo(torch.float16).min).any():
        # Where all keys have this, what is left of their logits in float32 is 1/256.
        step = 2.0**-6
    torch.testing.assert_close(got, wanted, rtol=max(2 * step, 2e-5), atol=max(step, 2e-5))
    assert got.dtype == wanted.dtype and got.is_contiguous()


@st.composite
def operands(draw: st.DrawFn):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows = draw(st.integers(1, decode_attention.MOST_ROWS + 1))
    kv_len = draw(st.integers(1, 70) | st.sampled_from([255, 256, 257, 530, 1100]))
    head_dim, value_dim = draw(st.sampled_from([(8, 8), (64, 64), (24, 40), (128, 16)]))
    dtype, scale = draw(DTYPES), draw(st.sampled_from([1.0, 0.125, -0.3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = randn(batch, heads, rows, head_dim)
    key, value = randn(batch, heads, kv_len, head_dim), randn(batch, heads, kv_len, value_dim)
    layout = draw(st.sampled_from(["whole", "slice of a buffer", "other order"]))
    if layout == "slice of a buffer":
        # What stands behind the entries is no one's: reading it would show.
        pairs = ((one, torch.full_like(one, math.nan)) for one in (key, value))
        key, value = (torch.cat(pair, 2)[:, :, :kv_len] for pair in pairs)
    elif layout == "other order":
        query, key, value = map(non_contiguous, (query, key, value))
    mask = None
    if draw(st.booleans()):
        sizes = (draw(st.sampled_from([1, whole])) for whole in (batch, heads, rows))
        mask = torch.randn(*sizes, draw(st.sampled_from([1, kv_len, kv_len])), generator=generator)
        mask = mask.to(dtype)
        hidden = draw(st.sampled_from([0.0, 0.5, 1.0]))
        lowest = draw(st.sampled_from([-math.inf, torch.finfo(dtype).min]))
        mask[torch.rand(mask.shape, generator=generator) < hidden] = lowest
    return query, key, value, mask, scale


@pytest.mark.parametrize("compiled", [True, False])
def test_it_is_pytorchs(compiled: bool) -> None:
    """With the C++ kernel, and with the library that stands in where there is no compiler."""
    assert cpp._library(torch.float32) is not None

    @SETTINGS
    @given(operands())
    def check(drawn) -> None:
        with mock.patch.object(cpp, "library", cpp.library if compiled else lambda *_: None):
            assert_alike(attend(*drawn), expected(*drawn), drawn[3])

    check()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 3, 3, 64), *torch.randn(2, 1, 3, 777, 64)
    torch.set_num_threads(threads)
    try:
        got = attend(query, key, value, None, 0.125)
    finally:
        torch.set_num_threads(before)
    assert_alike(got, expected(query, key, value, None, 0.125))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_spoils_its_own_head_and_no_other(bad: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.rand(1, 2, 3, 16), *torch.rand(2, 1, 2, 300, 16)
    clean = attend(query, key, value, None, 0.25)
    key[0, 1, 270] = bad
    got = attend(query, key, value, None, 0.25)
    assert torch.equal(got[:, 0], clean[:, 0]) and got[:, 1].isnan().all()


def test_its_fake_has_its_shape_dtype_and_layout() -> None:
    operands = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 5), None, 1.0
    torch.library.opcheck(
        torch.ops.ckv_compile.decode_attention.default,
        operands,
        test_utils=("test_schema", "test_faketensor"),
    )
