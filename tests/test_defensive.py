"""DefensiveKV's protected entries: what carries the attention stays before all else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SETTINGS

from ckv_compile import EvictionConfig, ScoreInputs
from ckv_compile.methods.defensive import _carriers, defensive


@SETTINGS
@given(st.integers(1, 40), st.sampled_from([1, 3, 1 << 20]), st.integers(0, 1 << 16))
def test_the_fewest_that_carry_the_mass(kv_len: int, levels: int, seed: int) -> None:
    """Prevents a set that is one short or one too large, and ties that go to the earlier."""
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers: their sums are exact, and what carries 3/4 of them is no matter of rounding.
    attention = torch.randint(0, levels, (2, 2, kv_len), generator=generator).float()
    chosen = _carriers(attention, 0.75)
    for row, own in zip(attention.flatten(0, 1).tolist(), chosen.flatten(0, 1), strict=True):
        order = sorted(range(kv_len), key=lambda i: (row[i], i), reverse=True)
        number = next(
            n for n in range(kv_len + 1) if sum(row[i] for i in order[:n]) >= 0.75 * sum(row)
        )
        assert set(own.nonzero()[:, 0].tolist()) == set(order[:number])


def test_protected_entries_come_first_by_their_attention() -> None:
    """Prevents a set that a large norm pushes out, and an order of its own within the set."""
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    value, weight = torch.randn(1, 2, 40, 8), torch.randn(16, 32)
    value[:, :, ::3] *= 100
    config = EvictionConfig(method="defensive", window_size=8)
    inputs = ScoreInputs(query, key, value, weight, False, None, None, config)
    attention = inputs.window_attention(kernel_size=1)
    protected = _carriers(attention, 0.9)
    scores = defensive(inputs).base
    assert scores[protected].min() > scores[~protected].max()
    for b, h in ((0, 0), (0, 1)):
        own = protected[b, h]
        assert 1 < int(own.sum()) < 32
        assert torch.equal(scores[b, h][own].argsort(), attention[b, h][own].argsort())
