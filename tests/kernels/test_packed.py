"""Packed entries: allocations are exact, and attention over ragged heads reads nothing else."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, SETTINGS, assert_attends_alike, ragged
from torch import Tensor

from ckv_compile.kernels import reference_packed as reference
from ckv_compile.kernels.cpu import few_queries as cpp
from ckv_compile.kernels.ragged_attention import ragged_attention
from ckv_compile.methods import pack
from ckv_compile.methods.allocation import ALLOCATIONS, Shares
from ckv_compile.sizes import TAIL

ALLOCATION = st.sampled_from(sorted(ALLOCATIONS))


@st.composite
def layers(draw: st.DrawFn):
    """Scores of some layers, the real tokens of each row and its budget."""
    batch, heads, kv_len = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
    )
    number = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    levels = draw(st.sampled_from([1, 3, 1 << 20]))

    def scores() -> Tensor:
        drawn = torch.randint(0, levels, (batch, heads, kv_len), generator=generator)
        # Heads of very different weight, as attention has them.
        return drawn / levels * torch.rand(1, heads, 1, generator=generator) ** 4

    bases = [scores() for _ in range(number)]
    norms = [scores() for _ in range(number)] if draw(st.booleans()) else []
    window = draw(st.sampled_from([1, 4, 32]))
    real = torch.ones(batch, kv_len, dtype=torch.bool)
    if draw(st.booleans()):
        pads = draw(st.integers(0, kv_len))
        real[0, :pads] = False
    budgets = []
    for row in real:
        n = int(row.sum())
        budgets.append(draw(st.integers(min(n, window + 1), n)))
    table = torch.rand(number * heads, generator=generator).tolist()
    # Of very different weight, and of none at all.
    asked = torch.rand(batch, number, generator=generator) ** draw(st.sampled_from([0, 1, 9]))
    asked[0] *= draw(st.sampled_from([0.0, 1e-20, 1.0]))
    return bases, norms, window, real, torch.tensor(budgets), table, asked


@SETTINGS
@given(layers(), ALLOCATION, st.sampled_from([0.0, 0.2, 1.0]))
def test_allocations_are_the_references_and_exact(drawn, allocation, safeguard):
    bases, _, window, real, row_budgets, table, asked = drawn
    shares = Shares(safeguard, tuple(table), asked)
    got = pack.head_budgets(bases, row_budgets, window, real, allocation, shares)
    expected = reference.head_budgets(
        bases, row_budgets, window, real, allocation, safeguard, table, asked
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    total = sum(layer.sum(-1) for layer in got)
    assert torch.equal(total, row_budgets * sum(base.shape[1] for base in bases))
    for layer in got:
        assert (layer <= real.sum(-1, keepdim=True)).all()
        assert (layer >= real.sum(-1, keepdim=True).clamp(max=window)).all()


@SETTINGS
@given(layers(), ALLOCATION, st.sampled_from([0.0, 0.5, 1.0]), DTYPES)
def test_packed_entries_are_the_references(drawn, allocation, ratio, dtype):
    """The kept entries without the last two of each head, which begin the tail."""
    bases, norms, window, real, row_budgets, table, asked = drawn
    assume(int(row_budgets.min()) >= TAIL)
    keys = [torch.randn(*base.shape, 3).to(dtype) for base in bases]
    values = [torch.randn(*base.shape, 5).to(dtype) for base in bases]
    window = max(window, TAIL)
    budgets = reference.head_budgets(
        bases, row_budgets, window, real, allocation, 0.2, table, asked
    )
    kept = reference.pack(keys, values, bases, norms, budgets, window, ratio, 1e-4, real)
    ends = kept[2][1:].long()
    packed = torch.ones(len(kept[0]), dtype=torch.bool)
    packed[torch.cat([ends - 1, ends - 2])] = False
    heads = torch.arange(len(kept[2]), dtype=torch.int32)
    expected = (kept[0][packed], kept[1][packed], kept[2] - TAIL * heads)
    entries = (int(row_budgets.sum()) - TAIL * len(real)) * sum(base.shape[1] for base in bases)
    got = torch.ops.ckv_compile.pack(
        keys, values, bases, norms, int(row_budgets.max()), entries, real, row_budgets, *[[]] * 5,
        window, [round(2 * ratio), 2], 1e-4, allocation, 0.2, table, asked,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("compiled", [True, False])
def test_ragged_attention_is_the_reference(compiled):
    """With the C++ kernel, and with the loop that stands in where there is no compiler."""
    assert cpp._library(torch.float32) is not None

    @SETTINGS
    @given(ragged())
    def check(operands):
        with mock.patch.object(cpp, "library", cpp.library if compiled else lambda *_: None):
            got = ragged_attention(**operands)
        expected = reference.ragged_attention(**operands)
        assert_attends_alike(got, expected, operands)

    check()


def test_what_stands_in_other_slots_is_never_read():
    """Zero padding that enters a softmax is a silent bug: here the slots around are hostile."""
    torch.manual_seed(0)
    key, value = torch.randn(300, 16), torch.randn(300, 16)
    query, tail = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    cu = torch.tensor([100, 130, 200], dtype=torch.int32)
    expected = ragged_attention(query, key, value, cu, tail, tail)
    for hostile in (math.nan, math.inf, 1e30):
        key[:100] = key[200:] = value[:100] = value[200:] = hostile
        assert torch.equal(ragged_attention(query, key, value, cu, tail, tail), expected)


def test_heads_of_one_length_are_sdpa():
    """The oracle of the oracle: torch's own attention."""
    torch.manual_seed(1)
    query = torch.randn(2, 6, 3, 32)
    key, value = torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    whole = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    packed_key, packed_value = (x[:, :, :40].reshape(-1, 32) for x in (key, value))
    cu = (torch.arange(5) * 40).int()
    got = ragged_attention(query, packed_key, packed_value, cu, key[:, :, 40:], value[:, :, 40:])
    torch.testing.assert_close(got, whole)
