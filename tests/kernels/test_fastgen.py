"""FastGen's policies against loops over heads, queries and keys in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from loops_fastgen import attention_had, chosen, kept_by
from strategies import DTYPES, SETTINGS
from torch import Tensor

from ckv_compile.methods.fastgen import FastGen
from ckv_compile.sizes import TAIL


@st.composite
def sequences(draw: st.DrawFn):
    """A prompt of padded rows, and then a block of new tokens."""
    batch, heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length, new = draw(st.integers(2, 24)), draw(st.integers(2, 8))
    real = torch.ones(batch, length, dtype=torch.bool)
    if draw(st.booleans()):
        pads = draw(st.integers(0, length - 2))
        real[0, :pads] = False
        if draw(st.booleans()):
            real = real.flip(1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    dtype, sharp = draw(DTYPES), draw(st.sampled_from([0.3, 2.0]))

    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * sharp).to(dtype)

    total = length + new
    kinds = torch.multinomial(torch.tensor([0.7, 0.1, 0.2]), batch * total, True).view(batch, -1)
    return {
        "query": randn(batch, heads * groups, total, 8),
        "key": randn(batch, heads, total, 8),
        "value": randn(batch, heads, total, 6),
        "kinds": kinds.to(torch.int8),
        "real": real,
        "new": new,
        "recovery": draw(st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0])),
    }


@SETTINGS
@given(sequences())
def test_policies_are_chosen_and_applied_again(drawn):
    """What is chosen on a prompt, what stays, what it remembers, and what stays a block later."""
    query, key, value, kinds = (drawn[name] for name in ("query", "key", "value", "kinds"))
    real, new = drawn["real"], drawn["new"]
    (batch, heads), length = key.shape[:2], real.shape[1]
    groups, node = query.shape[1] // heads, FastGen(drawn["recovery"])

    def cut(tensor: Tensor, part: slice) -> Tensor:
        return tensor[:, :, part]

    first, second = slice(0, length), slice(length, None)
    state = node(*(cut(x, first) for x in (query, key, value)), None, real, None, kinds[:, first])
    tails = [
        torch.cat([tail, cut(x, second)], 2)
        for tail, x in zip(state[9:], (key, value), strict=True)
    ]
    heard = [kinds[b, first][real[b]][-TAIL:] for b in range(batch)]
    tail_kinds = torch.cat([torch.stack(heard), kinds[:, second]], 1)
    again = node(cut(query, second), *tails, None, None, None, tail_kinds, state[:9])

    for b in range(batch):
        places = torch.cat([real[b].nonzero()[:, 0], torch.arange(length, length + new)])
        n = len(places) - new
        marks = kinds[b, places].tolist()
        for h in range(heads):
            members, slot = slice(h * groups, (h + 1) * groups), b * heads + h
            had = attention_had(query[b, members][:, places[:n]], key[b, h, places[:n]], groups)
            policy = chosen(had, marks[:n], n, drawn["recovery"])
            if policy < 0:
                policy = int(state[7][b, h])
            assert int(state[7][b, h]) == policy
            held = sorted(kept_by(policy, had, marks[:n], list(range(n)), n))
            assert_holds(state, slot, key[b, h, places], value[b, h, places], held[:-TAIL])
            torch.testing.assert_close(
                [*state[3][slice(*state[2][slot : slot + 2])].tolist(), *state[6][b, h].tolist()],
                [had[i] for i in held], rtol=1e-3, atol=1e-4,
            )  # fmt: skip
            ranks = [*held, *range(n, n + new)]
            more = attention_had(query[b, members][:, places[n:]], key[b, h, places[ranks]], groups)
            before = [*(had[i] for i in held), *[0.0] * new]
            all_had = [x + y for x, y in zip(before, more, strict=True)]
            kept = kept_by(policy, all_had, [marks[i] for i in ranks], ranks, n + new)
            at = [ranks[i] for i in sorted(kept)]
            assert_holds(again, slot, key[b, h, places], value[b, h, places], at[:-TAIL])
        assert int(again[8][b]) == n + new
    assert torch.equal(again[7], state[7])


def assert_holds(
    state: tuple[Tensor, ...], slot: int, key: Tensor, value: Tensor, held: list[int]
) -> None:
    part = slice(*state[2][slot : slot + 2].tolist())
    assert state[5][part].tolist() == held
    assert torch.equal(state[0][part], key[held]) and torch.equal(state[1][part], value[held])
