"""Heads that were cut before, scored and shared out again, against one head at a time."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, SETTINGS
from torch import Tensor

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference, reference_packed
from ckv_compile.methods import pack
from ckv_compile.methods.allocation import ALLOCATIONS, Shares
from ckv_compile.methods.ragged import ScorePacked
from ckv_compile.sizes import TAIL


@st.composite
def tables(draw: st.DrawFn, layers: int = 3):
    """Where entries stand, ``[B, Hkv, P + t]`` bool of each layer, and which of the tail are real.

    Packed ones end where the tail begins; of padded rows the last columns of the tail are pads.
    """
    batch, heads, tail = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, 9))
    number, lengths = draw(st.integers(1, layers)), st.integers(0, 12)
    before = torch.tensor(
        draw(st.lists(lengths, min_size=number * batch * heads, max_size=number * batch * heads))
    ).view(number, batch, heads, 1)
    real = torch.ones(batch, tail, dtype=torch.bool)
    if draw(st.booleans()):
        real[0, draw(st.integers(TAIL, tail)) :] = False
    width = int(before.max())
    places = torch.arange(width) >= width - before
    rows = real[:, None].expand(batch, heads, tail)
    return [torch.cat([layer, rows], dim=-1) for layer in places], real, width


def packed_of(table: Tensor, where: Tensor, width: int) -> Tensor:
    """The packed entries of ``[B, Hkv, P + t, *]``, one head after the other."""
    return table[:, :, :width][where[:, :, :width]]


def starts_of(where: Tensor, width: int) -> Tensor:
    lengths = where[:, :, :width].sum(-1).flatten()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


@SETTINGS
@given(
    tables(),
    st.sampled_from(sorted(set(ALLOCATIONS) - {"cake"})),  # which is not cut again
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([1, 3, 1 << 20]),
    st.booleans(),
    st.data(),
)
def test_entries_are_the_references(drawn, allocation, ratio, window, levels, two_stages, data):
    """Allocated anew to the entry, none taken from a head that does not hold it."""
    wheres, real, width = drawn
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 16)))

    def table(*shape: int) -> Tensor:
        return torch.randint(0, levels, shape, generator=generator) / levels

    shape = tuple(wheres[0].shape)
    bases, norms = ([table(*shape) for _ in wheres] for _ in range(2))
    keys, values = ([torch.randn(*shape, size) for _ in wheres] for size in (3, 5))
    shares = torch.rand(len(wheres) * shape[1], generator=generator).tolist()
    window, heads = max(window, TAIL), shape[1]
    held = torch.stack([where.sum((1, 2)) for where in wheres]).amin(0) // heads
    rows = torch.tensor([data.draw(st.integers(TAIL, n)) for n in held.tolist()])
    budgets = reference_packed.head_budgets(bases, rows, window, wheres, allocation, 0.2, shares)
    got = pack.head_budgets(bases, rows, window, wheres, allocation, Shares(0.2, tuple(shares)))
    assert all(torch.equal(a, b) for a, b in zip(got, budgets, strict=True))
    assert torch.equal(sum(layer.sum(-1) for layer in got), rows * len(wheres) * heads)
    expected = []
    for i, where in enumerate(wheres):
        for b, h in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(heads)).tolist():
            one, count = (slice(b, b + 1), slice(h, h + 1)), int(budgets[i][b, h])
            kept = where[b, h].nonzero()[:, 0]
            if count < len(kept):
                norm = norms[i][one] if two_stages else None
                options = (count, window, ratio, 1e-4, where[b, h][None], torch.tensor([count]))
                kept = reference.select(bases[i][one], norm, *options)[0, 0]
            expected.append((keys[i][b, h, kept[:-TAIL]], values[i][b, h, kept[:-TAIL]]))
    entries = int((rows - TAIL).sum()) * heads * len(wheres)

    def before(parts: list[Tensor]) -> list[Tensor]:
        return [packed_of(part, where, width) for part, where in zip(parts, wheres, strict=True)]

    def since(parts: list[Tensor]) -> list[Tensor]:
        return [part[:, :, width:] for part in parts]

    ragged = [starts_of(where, width) for where in wheres]
    key, value, starts = torch.ops.ckv_compile.pack(
        since(keys), since(values), since(bases), since(norms) if two_stages else [],
        int(rows.max()), entries, real, rows, before(keys), before(values), ragged, before(bases),
        before(norms) if two_stages else [], window, [round(2 * ratio), 2], 1e-4, allocation, 0.2,
        shares,
    )  # fmt: skip
    assert torch.equal(key, torch.cat([k for k, _ in expected]))
    assert torch.equal(value, torch.cat([v for _, v in expected]))
    assert starts.diff().tolist() == [len(k) for k, _ in expected]


@SETTINGS
@given(
    tables(layers=1),
    st.sampled_from([1, 3]),
    DTYPES,
    st.booleans(),
    st.sampled_from(["l1", "l2", "value"]),
    st.data(),
)
def test_scores_are_the_references(drawn, groups, dtype, in_out, norm, data):
    """A head is scored as if it were alone, through its own part of the projection."""
    (where,), real, width = drawn
    (batch, heads, kv_len), window = where.shape, data.draw(st.sampled_from([1, 4, 32]))
    q_len = data.draw(st.integers(1, kv_len - width))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = randn(batch, heads * groups, q_len, 8)
    key, value = randn(batch, heads, kv_len, 8), randn(batch, heads, kv_len, 6)
    features = heads * groups * 6
    weight = randn(features, 10) if in_out else randn(10, features)
    config = EvictionConfig(window_size=window, kernel_size=3, norm=norm)
    # The store holds entries of another layer as well.
    packed = [torch.cat([packed_of(x, where, width), randn(2, x.shape[3])]) for x in (key, value)]
    got = ScorePacked(config, in_out)(
        query, *packed, starts_of(where, width), key[:, :, width:], value[:, :, width:], weight,
        padding=real,
    )  # fmt: skip
    norms = reference.projected_norm(value, weight, in_out, heads * groups, norm)
    bases = torch.zeros(where.shape)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        bases[b, h] = reference.window_attention(
            query[b : b + 1, h * groups : (h + 1) * groups], key[b : b + 1, h : h + 1], None,
            window, 3, real=where[b, h][None],
        )[0, 0]  # fmt: skip
    for tail, before, expected in zip(got[::2], got[1::2], (bases, norms), strict=True):
        inside = real[:, None].expand(tail.shape)
        torch.testing.assert_close(
            tail[inside], expected[:, :, width:][inside], rtol=1e-3, atol=1e-5
        )
        own = packed_of(expected, where, width)
        torch.testing.assert_close(before[: len(own)], own, rtol=1e-3, atol=1e-5)
        assert not before[len(own) :].any()
