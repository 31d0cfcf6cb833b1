"""The oracle itself, against a NumPy statement of the same sentences in float64."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckv_compile.kernels import reference

SETTINGS = settings(deadline=None, max_examples=40)
RATIOS = [0.0, 0.3, 0.5, 0.7, 1.0]
# Long enough for a second block of anything, odd, and rare: the loops are slow.
LENGTHS = st.integers(1, 40) | st.sampled_from([1, 2, 31, 33, 63, 127])
FLOAT32_STEP = 2.0**-23


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def query_and_key(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, H, K, D]`` and ``[B, Hkv, K, D]`` of one causal prefill."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups, head_dim = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([8, 24, 128]))
    kv_len = draw(LENGTHS)
    generator = generator_of(draw(st.integers(0, 1 << 16)))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))  # 0: every key alike, every score equal
    query = torch.randn(batch, kv_heads * groups, kv_len, head_dim, generator=generator)
    key = torch.randn(batch, kv_heads, kv_len, head_dim, generator=generator) * spread
    return query, key


@st.composite
def value_and_weight(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, bool, int]:
    """``[B, Hkv, K, Dv]``, the weight in either layout, whether it is in-out, and H."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups, head_dim = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([8, 24, 128]))
    kv_len, hidden_size = draw(LENGTHS), draw(st.sampled_from([1, 16, 37]))
    generator = generator_of(draw(st.integers(0, 1 << 16)))
    value = torch.randn(batch, kv_heads, kv_len, head_dim, generator=generator)
    kind = draw(st.sampled_from(["random", "zero", "one huge"]))
    if kind == "zero":
        value[:, :, ::2] = 0
    if kind == "one huge":
        value[:, :, draw(st.integers(0, kv_len - 1))] *= 1e6
    heads, in_out = kv_heads * groups, draw(st.booleans())
    rows, columns = (heads * head_dim, hidden_size) if in_out else (hidden_size, heads * head_dim)
    return value, torch.randn(rows, columns, generator=generator), in_out, heads


@st.composite
def score_arrays(
    draw: st.DrawFn, lengths: st.SearchStrategy[int] = LENGTHS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and norm ``[B, Hkv, K]`` float32: from a few values, so many tie, or all apart."""
    batch, kv_heads, kv_len = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(lengths)
    generator = generator_of(draw(st.integers(0, 1 << 16)))

    def scores() -> torch.Tensor:
        levels = draw(st.sampled_from([1, 2, 5, 1 << 20]))
        drawn = torch.randint(0, levels, (batch, kv_heads, kv_len), generator=generator)
        scores = drawn.float() / levels + draw(st.sampled_from([0.0, 0.25]))
        if draw(st.booleans()):
            scores[:, :, draw(st.integers(0, kv_len - 1))] = 1e15
        return scores

    return scores(), scores()


@SETTINGS
@given(
    query_and_key(),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([1, 3, 7]),
    st.sampled_from([None, 5.0, 50.0]),
)
def test_window_attention(
    tensors: tuple[torch.Tensor, torch.Tensor],
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
) -> None:
    """Prevents a wrong causal edge, pooling that sees the window, or a group that is summed."""
    query, key = tensors
    options = (scale, window_size, kernel_size, softcap)
    expected = brute_force.window_attention(query.numpy(), key.numpy(), *options)
    actual = reference.window_attention(query, key, *options).numpy()
    # A logit is off by some rounding steps of its terms, and exp turns that into a relative error.
    widest = query.norm(dim=-1).max() * key.norm(dim=-1).max()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    tolerance = 8 * FLOAT32_STEP * (4 + float(widest) * factor)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-30)
    assert not actual[:, :, max(key.shape[2] - window_size, 0) :].any()


@SETTINGS
@given(value_and_weight(), st.sampled_from(["l1", "l2", "value"]))
def test_projected_norm(drawn: tuple[torch.Tensor, torch.Tensor, bool, int], norm: str) -> None:
    """Prevents the weight from being read in the other layout or cut at other heads."""
    value, weight, in_out, heads = drawn
    expected = brute_force.projected_norm(value.numpy(), weight.numpy(), in_out, heads, norm)
    actual = reference.projected_norm(value, weight, in_out, heads, norm).numpy()
    # Terms of a product may cancel: the error follows their size, not the sum's.
    terms = value.norm(dim=-1).numpy() * (1.0 if norm == "value" else float(weight.norm()))
    assert (np.abs(actual - expected) <= 16 * FLOAT32_STEP * (expected + terms)).all()
    assert (actual[(value == 0).all(-1).numpy()] == 0).all()


@pytest.mark.parametrize("in_out", [False, True])
def test_with_adapters(in_out: bool) -> None:
    """Prevents an oracle that adds another matrix than the layers together multiply by."""
    generator = generator_of(0)
    shapes = [(6, 9) if in_out else (9, 6), (6, 2), (2, 9), (6, 9), (5, 6)]
    weight, down, up, full, x = (torch.randn(*s, generator=generator) for s in shapes)
    adapters = [([down, up], [0.5, 3.0]), ([full], [])]
    whole = reference.with_adapters(weight, in_out, adapters).numpy().astype(np.float64)
    actual = x.numpy() @ (whole if in_out else whole.T)
    x, weight, down, up, full = (t.double() for t in (x, weight, down, up, full))
    expected = x @ (weight if in_out else weight.T) + 1.5 * ((x @ down) @ up) + x @ full
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5)


@SETTINGS
@given(score_arrays(), st.data(), st.sampled_from([1, 4, 32]), st.sampled_from(RATIOS))
def test_select(
    scores: tuple[torch.Tensor, torch.Tensor],
    data: st.DataObject,
    window_size: int,
    ratio: float,
) -> None:
    """Prevents a tie from going to the earlier position, or the stages from sharing an entry."""
    base, norm = scores
    kv_len = base.shape[2]
    budget = data.draw(st.integers(1, kv_len), label="budget")
    options = (budget, window_size, ratio, 1e-4)
    for norms in (norm, None):
        numpy_norms = None if norms is None else norms.numpy()
        expected = brute_force.select(base.numpy(), numpy_norms, *options)
        actual = reference.select(base, norms, *options)
        assert actual.tolist() == expected.tolist()
        assert actual.shape == (*base.shape[:2], budget)


@settings(deadline=None, max_examples=5)
@given(score_arrays(st.sampled_from([257, 511, 600])), st.sampled_from(RATIOS))
def test_select_of_a_long_prompt(scores: tuple[torch.Tensor, torch.Tensor], ratio: float) -> None:
    """Prevents what only shows above the small lengths of the other tests."""
    base, norm = scores
    options = (base.shape[2] // 5, 32, ratio, 1e-4)
    expected = brute_force.select(base.numpy(), norm.numpy(), *options)
    assert reference.select(base, norm, *options).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        # Window 1: position 7. Attention ranks 0, 1, 2, ...; attention times norm ranks 6, 5, ...
        (0.0, [4, 5, 6, 7]),
        (0.5, [0, 5, 6, 7]),
        (0.75, [0, 1, 6, 7]),
        (1.0, [0, 1, 2, 7]),
    ],
)
def test_select_by_hand(ratio: float, kept: list[int]) -> None:
    """Prevents both statements from sharing one misreading: the window counts in stage 1."""
    base = torch.tensor([[[8.0, 7, 6, 5, 4, 3, 2, 0]]])
    norm = torch.tensor([[[1.0, 2, 3, 4, 10, 20, 40, 0]]])
    assert reference.select(base, norm, 4, 1, ratio, 0.0).tolist() == [[kept]]
    assert brute_force.select(base.numpy(), norm.numpy(), 4, 1, ratio, 0.0).tolist() == [[kept]]


def test_select_of_equal_scores_keeps_the_most_recent() -> None:
    """Prevents zero values, whose stage-2 scores all tie, from being kept by accident of a sort."""
    ones, zeros = torch.ones(1, 1, 9), torch.zeros(1, 1, 9)
    for base, norm in ((ones, ones), (zeros, ones), (ones, zeros), (zeros, zeros)):
        assert reference.select(base, norm, 5, 2, 0.5, 0.0).tolist() == [[[4, 5, 6, 7, 8]]]


@pytest.mark.parametrize("ratio", [0.29, 0.57, 0.58])
def test_first_stage_share_is_exact(ratio: float) -> None:
    """Prevents floor(0.29 * 100) from being 28, as the product of floats says."""
    base = torch.arange(200.0, 0, -1).reshape(1, 1, 200)
    norm = torch.arange(200.0).square().reshape(1, 1, 200)
    kept = reference.select(base, norm, 100, 1, ratio, 0.0)[0, 0].tolist()
    first = round(ratio * 100)
    assert int(ratio * 100) == first - 1
    assert kept[: first - 1] == list(range(first - 1))
    assert kept[first - 1] > first - 1


def separated(scores: np.ndarray) -> bool:
    """Whether no two scores of a head are so near that float32 could swap them."""
    gaps = np.diff(np.sort(scores, axis=-1), axis=-1)
    return bool((gaps > 1e-4 * np.abs(scores).max()).all())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1 << 16),
    st.sampled_from(RATIOS),
    st.sampled_from(["l1", "l2", "value"]),
    st.sampled_from([1, 3]),
    st.integers(5, 20),
)
def test_the_whole_algorithm(seed: int, ratio: float, norm: str, groups: int, budget: int) -> None:
    """Prevents the parts from agreeing one by one and being put together differently."""
    generator = generator_of(seed)
    query = torch.randn(1, 2 * groups, 20, 8, generator=generator) * 2
    key, value = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(2))
    weight = torch.randn(16, 16 * groups, generator=generator)
    base = brute_force.window_attention(query.numpy(), key.numpy(), None, 4, 1)
    norms = brute_force.projected_norm(value.numpy(), weight.numpy(), False, 2 * groups, norm)
    second = brute_force.stage_two_scores(base, norms, 1e-4)
    assume(separated(base[:, :, :16]) and separated(second[:, :, :16]))
    expected = brute_force.kept_positions(
        query.numpy(),
        key.numpy(),
        value.numpy(),
        weight.numpy(),
        budget=budget,
        window_size=4,
        kernel_size=1,
        first_stage_ratio=ratio,
        epsilon=1e-4,
        norm=norm,
    )
    actual = reference.select(
        reference.window_attention(query, key, None, 4, 1),
        reference.projected_norm(value, weight, False, 2 * groups, norm),
        budget,
        4,
        ratio,
        1e-4,
    )
    assert actual.tolist() == expected.tolist()


def test_compact_copies_the_kept_rows() -> None:
    """Prevents K and V from being gathered with another head's positions."""
    key = torch.arange(2 * 2 * 5 * 3.0).reshape(2, 2, 5, 3)
    value = -torch.arange(2 * 2 * 5 * 4.0).reshape(2, 2, 5, 4)
    keep = torch.tensor([[[0, 4], [1, 2]], [[3, 4], [0, 1]]])
    kept_key, kept_value = reference.compact(key, value, keep)
    for b in range(2):
        for h in range(2):
            for j in range(2):
                i = int(keep[b, h, j])
                assert kept_key[b, h, j].tolist() == key[b, h, i].tolist()
                assert kept_value[b, h, j].tolist() == value[b, h, i].tolist()
