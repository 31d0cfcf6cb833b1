"""The traced twins against the oracle: scores to float32 tolerance, decisions exactly."""

from __future__ import annotations

import gc
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, FLOAT32_STEP, LENGTHS, SETTINGS, site
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import compact, projected_norm, reference, select, window_attention
from ckv_compile.kernels.adapters import with_adapters
from ckv_compile.methods.evict import EvictKV

WINDOWS = st.sampled_from([0, 1, 4, 32])  # 0: an encoder's entries, none of which is exempt
RATIOS = st.sampled_from([0.0, 0.29, 0.5, 1.0])


@st.composite
def score_tensors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Base and norm ``[B, Hkv, K]``: many ties or all apart; huge, negative."""
    batch, kv_heads, kv_len = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(LENGTHS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def scores() -> Tensor:
        levels = draw(st.sampled_from([1, 2, 5, 1 << 22]))
        drawn = torch.randint(0, levels, (batch, kv_heads, kv_len), generator=generator)
        scores = (drawn.float() / levels - draw(st.sampled_from([0.0, 0.4]))).float()
        if draw(st.booleans()):
            scores[:, :, draw(st.integers(0, kv_len - 1))] = draw(
                st.sampled_from([3e38, -3e38, -0.0, 1e-45, -1e-45])
            )
        return scores

    return scores(), scores()


def assert_valid(keep: Tensor, budget: int, kv_len: int, window_size: int) -> None:
    """Ascending, in range, without repeats, the window (what of it fits the budget) among them."""
    assert (keep.dtype, keep.shape[2]) == (torch.int64, budget)
    assert (keep.diff(dim=-1) > 0).all()
    assert int(keep.min()) >= 0 and int(keep.max()) < kv_len
    window = min(window_size, kv_len, budget)
    expected = torch.arange(kv_len - window, kv_len).expand_as(keep[..., budget - window :])
    assert torch.equal(keep[..., budget - window :], expected)


@SETTINGS
@given(
    site(),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([1, 3, 7]),
    st.sampled_from([None, 5.0, 50.0]),
)
def test_window_attention(
    site: dict[str, Any],
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
) -> None:
    """Prevents a score in half precision, and a pool whose padding or window leaks in."""
    query, key = site["query"], site["key"]
    kv_len = key.shape[2]
    options = (scale, window_size, kernel_size, softcap)
    actual = window_attention.window_attention(query, key, *options)
    assert (actual.dtype, actual.shape) == (torch.float32, key.shape[:3])
    assert actual.isfinite().all()
    assert not actual[:, :, max(kv_len - window_size, 0) :].any()
    if kv_len > window_size:
        expected = reference.window_attention(query, key, *options)
        # A logit is off by some rounding steps of its terms; exp makes that a relative error.
        widest = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        tolerance = 16 * FLOAT32_STEP * (4 + float(widest) * factor)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30)


@SETTINGS
@given(site(), st.sampled_from(["l1", "l2", "value"]))
def test_projected_norm(site: dict[str, Any], norm: str) -> None:
    """Prevents a weight read in the other layout, and half-precision norms that overflow."""
    value, weight, heads = site["value"], site["weight"], site["query"].shape[1]
    actual = projected_norm.projected_norm(value, weight, site["in_out"], heads, norm)
    expected = reference.projected_norm(value, weight, site["in_out"], heads, norm)
    assert (actual.dtype, actual.shape) == (torch.float32, value.shape[:3])
    terms = value.float().norm(dim=-1) * (1 if norm == "value" else weight.float().norm())
    # Of L2 it is the square that is summed, so its error is the root of a rounding step.
    step = FLOAT32_STEP**0.5 if norm == "l2" else 16 * FLOAT32_STEP
    assert ((actual - expected).abs() <= step * (expected + terms)).all()
    if norm == "l2":
        large = expected > 0.05 * terms
        torch.testing.assert_close(actual[large], expected[large], rtol=1e-3, atol=0)
    assert (actual[(value == 0).all(-1)] == 0).all()


@st.composite
def adapted(draw: st.DrawFn) -> tuple[Tensor, bool, list[tuple[list[Tensor], list[float]]]]:
    """A weight, whether it is in-out, and chains of one to three matrices beside it."""
    inside, out = draw(st.sampled_from([1, 8, 24])), draw(st.sampled_from([1, 16, 37]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    in_out = draw(st.booleans())

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(draw(DTYPES))

    adapters = []
    for _ in range(draw(st.integers(0, 3))):
        sizes = [inside, *draw(st.lists(st.sampled_from([1, 4, 9]), max_size=2)), out]
        matrices = [randn(*pair) for pair in itertools.pairwise(sizes)]
        adapters.append((matrices, draw(st.lists(st.sampled_from([0.0, 0.5, -2.0]), max_size=2))))
    return (randn(inside, out) if in_out else randn(out, inside)), in_out, adapters


@SETTINGS
@given(adapted())
def test_with_adapters(drawn: tuple[Tensor, bool, Any]) -> None:
    """Prevents an adapter in the other layout, unscaled, or summed in half precision."""
    weight, _, adapters = drawn
    actual = with_adapters(*drawn)
    assert actual is weight if not adapters else actual.dtype == torch.float32
    expected = reference.with_adapters(*drawn)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kv_len", [1, 300, 1111])
def test_projected_norm_in_blocks(in_out: bool, kv_len: int) -> None:
    """Prevents a last, shorter block from being skipped or from keeping the rows of another."""
    hidden_size, heads, head_dim = 1024, 4, 16  # 256 rows a block on a CPU
    value = torch.randn(2, 2, kv_len, head_dim)
    shape = (heads * head_dim, hidden_size) if in_out else (hidden_size, heads * head_dim)
    weight = torch.randn(*shape)
    actual = projected_norm.projected_norm(value, weight, in_out, heads, "l1")
    expected = reference.projected_norm(value, weight, in_out, heads, "l1")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_the_root_follows_its_weight() -> None:
    """Prevents norms of weights that are no more: written in place, through .data, or replaced."""
    value, weight = torch.randn(1, 2, 5, 8), torch.nn.Parameter(torch.randn(12, 32))

    def check() -> None:
        actual = projected_norm.projected_norm(value, weight, False, 4, "l2")
        expected = reference.projected_norm(value, weight.detach(), False, 4, "l2")
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        check()
        check()
        weight.mul_(3)
        check()
        weight.data += 1
        check()
        weight.data = torch.randn(12, 32)
        check()


def test_the_root_is_made_once_and_goes_with_its_weight() -> None:
    """Prevents a product with W in each prefill, and matrices of models that were deleted."""
    weight, made = torch.randn(12, 32), projected_norm.root_of
    held = len(projected_norm._ROOTS)
    with mock.patch.object(projected_norm, "root_of", side_effect=made) as root_of:
        for _ in range(3):
            projected_norm.projected_norm(torch.randn(1, 2, 5, 8), weight, False, 4, "l2")
    assert root_of.call_count == 1 and len(projected_norm._ROOTS) == held + 1
    del weight
    gc.collect()
    assert len(projected_norm._ROOTS) == held


@pytest.mark.parametrize("kv_len", [63, 64, 65, 129, 200])
def test_window_attention_in_blocks(kv_len: int) -> None:
    """Prevents a block whose keys, mask or bias are another's, and a maximum of one block alone."""
    query, key = 3 * torch.randn(2, 4, kv_len, 8), torch.randn(2, 2, kv_len, 8)
    real = torch.arange(kv_len) >= torch.tensor([[0], [29]])
    given: list[dict[str, Any]] = [
        {}, {"real": real}, {"bias": torch.randn(1, 4, kv_len, kv_len)},
        {"sinks": torch.randn(4), "softcap": 5.0},
    ]  # fmt: skip
    with mock.patch.object(window_attention, "_BLOCK_BYTES", 0):
        for extra in given:
            actual = window_attention.window_attention(query, key, None, 8, 5, **extra)
            expected = reference.window_attention(query, key, None, 8, 5, **extra)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=150)
@given(score_tensors(), st.data(), WINDOWS, RATIOS, st.sampled_from([0, 1e-4]))
def test_select(
    scores: tuple[Tensor, Tensor],
    data: st.DataObject,
    window_size: int,
    ratio: float,
    epsilon: float,
) -> None:
    """Prevents a tie, a sign or a bit pattern from being ordered otherwise than the oracle does."""
    base, norm = scores
    kv_len = base.shape[2]
    budget = data.draw(st.integers(1, kv_len), label="budget")
    for norms in (norm, None):
        options = (base, norms, budget, window_size, ratio, epsilon)
        actual = select.select(*options)
        assert_valid(actual, budget, kv_len, window_size)
        assert torch.equal(actual, reference.select(*options))


@pytest.mark.parametrize("kv_len", [599, 600])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_select_of_a_long_prompt(kv_len: int, ratio: float) -> None:
    """Prevents what a library top-k does differently on longer rows: some hundred ties here."""
    base = torch.randint(0, 5, (2, 2, kv_len)) / 5
    norm = torch.randint(0, 5, (2, 2, kv_len)) / 5
    for budget in (33, 120, kv_len - 1, kv_len):
        options = (base, norm, budget, 32, ratio, 1e-4)
        assert torch.equal(select.select(*options), reference.select(*options))


@SETTINGS
@given(score_tensors(), st.data(), WINDOWS, RATIOS)
def test_select_of_scores_that_are_no_numbers(
    scores: tuple[Tensor, Tensor], data: st.DataObject, window_size: int, ratio: float
) -> None:
    """Prevents NaN, which top-k ranks first, from pushing the window out of the cache."""
    base, norm = (tensor.clone() for tensor in scores)
    kv_len = base.shape[2]
    budget = data.draw(st.integers(1, kv_len), label="budget")
    positions = st.lists(st.integers(0, kv_len - 1), max_size=kv_len)
    for tensor in (base, norm):
        for bad in (torch.nan, torch.inf, -torch.inf):
            tensor[:, :, data.draw(positions)] = bad
    for norms in (norm, None):
        keep = select.select(base, norms, budget, window_size, ratio, 1e-4)
        assert_valid(keep, budget, kv_len, window_size)


@pytest.mark.parametrize("ratio", [0.29, 0.57, 0.58])
def test_first_stage_share_is_exact(ratio: float) -> None:
    """Prevents floor(0.29 * 100) from being 28, as the product of floats says."""
    base = torch.arange(200.0, 0, -1).reshape(1, 1, 200)
    norm = torch.arange(200.0).square().reshape(1, 1, 200)
    options = (base, norm, 100, 1, ratio, 0.0)
    assert int(ratio * 100) == round(ratio * 100) - 1
    assert torch.equal(select.select(*options), reference.select(*options))


def test_select_takes_a_nan_last() -> None:
    """Prevents a broken entry from being kept while a sound one is evicted."""
    base = torch.tensor([[[torch.nan, 0.0, torch.nan, -1.0, torch.nan, 0.0]]])
    assert select.select(base, None, 3, 1, 0.5, 0.0).tolist() == [[[1, 3, 5]]]
    ones = torch.ones(1, 1, 6)
    for ratio in (0.0, 0.5, 1.0):
        assert select.select(base, ones, 3, 1, ratio, 0.0).tolist() == [[[1, 3, 5]]]
    # Where only NaN is left, the later position, as for any tie.
    assert select.select(base, None, 4, 1, 0.5, 0.0).tolist() == [[[1, 3, 4, 5]]]


@SETTINGS
@given(site(), st.data())
def test_compact(site: dict[str, Any], data: st.DataObject) -> None:
    """Prevents a kept row from another head, and a cache that shares the prompt's storage."""
    key, value = site["key"], site["value"][..., :5]
    kv_len = key.shape[2]
    budget = data.draw(st.integers(1, kv_len), label="budget")
    keep = torch.rand(key.shape[:3]).topk(budget, dim=-1).indices.sort(-1).values
    actual, expected = compact.compact(key, value, keep), reference.compact(key, value, keep)
    for cut, right, whole in zip(actual, expected, (key, value), strict=True):
        assert torch.equal(cut, right)
        assert cut.dtype == whole.dtype and cut.is_contiguous()
        assert cut.untyped_storage().nbytes() == cut.numel() * cut.element_size()
        assert cut.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def oracle(
    config: EvictionConfig,
    site: dict[str, Any],
    budget: int,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The cut cache, from the twins' scores and the oracle's decisions: a score that is off by one
    rounding step must not fail a test of the positions."""
    query, key, value = site["query"], site["key"], site["value"]
    base = window_attention.window_attention(
        query, key, scale, config.window_size, config.kernel_size, softcap
    )
    norm = None
    if config.method == "criticalkv":
        norm = projected_norm.projected_norm(
            value, site["weight"], site["in_out"], query.shape[1], config.norm
        )
    stages = (config.window_size, config.first_stage_ratio, config.epsilon)
    return reference.compact(key, value, reference.select(base, norm, budget, *stages))


def evicted(
    config: EvictionConfig,
    site: dict[str, Any],
    capacity: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    module = EvictKV(config, site["in_out"], from_config=capacity is None)
    given = None if capacity is None else torch.empty(capacity, 0)
    tensors = (site["query"], site["key"], site["value"], site["weight"])
    with torch.no_grad():
        return module(*tensors, scale=scale, softcap=softcap, capacity=given)[:2]


@SETTINGS
@given(
    site(),
    st.sampled_from(["criticalkv", "snapkv"]),
    st.sampled_from(["l1", "l2", "value"]),
    st.sampled_from([1, 4, 32]),
    RATIOS,
    st.sampled_from([0.2, 0.5, 1.0, 40, "max(34, n/3)", "n - 3"]),
    st.none() | st.integers(1, 300),
    st.sampled_from([(None, None), (0.3, None), (1.0, 20.0)]),
)
def test_evict_kv(
    site: dict[str, Any],
    method: str,
    norm: str,
    window_size: int,
    ratio: float,
    budget: float | int | str,
    capacity: int | None,
    logits: tuple[float | None, float | None],
) -> None:
    """Prevents the node from passing an option, the scale or the budget to the wrong kernel."""
    config = EvictionConfig(budget, method, window_size, 7, ratio, 1e-4, norm)
    scale, softcap = logits
    kv_len = site["key"].shape[2]
    entries = config.entries(kv_len) if capacity is None else min(capacity, kv_len)
    actual = evicted(config, site, capacity, scale, softcap)
    expected = oracle(config, site, entries, scale, softcap)
    for cut, right in zip(actual, expected, strict=True):
        assert cut.shape[2] == entries
        assert torch.equal(cut, right)
    if entries == kv_len:
        assert torch.equal(actual[0], site["key"]) and torch.equal(actual[1], site["value"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("budget", 0.4),
        ("method", "snapkv"),
        ("window_size", 9),
        ("kernel_size", 1),
        ("first_stage_ratio", 0.9),
        ("epsilon", 0.5),
        ("norm", "l2"),
        ("scale", 0.05),
        ("softcap", 0.5),
    ],
)
def test_every_option_reaches_its_kernel(option: str, value: Any) -> None:
    """Prevents an option from being dropped on its way to a kernel: it changes the result."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"query": randn(2, 4, 200, 16) * 3, "key": randn(2, 2, 200, 16)}
    tensors |= {"value": randn(2, 2, 200, 16), "weight": randn(8, 64)}
    sample: dict[str, Any] = {**tensors, "in_out": False}
    plain = evicted(EvictionConfig(0.3, window_size=8), sample)
    options: dict[str, Any] = {"budget": 0.3, "window_size": 8}
    logits = {option: value} if option in ("scale", "softcap") else {}
    if not logits:
        options[option] = value
    config = EvictionConfig(**options)
    actual = evicted(config, sample, **logits)
    expected = oracle(config, sample, config.entries(200), **logits)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert not torch.equal(actual[0], plain[0])


@SETTINGS
@given(site(st.integers(2, 40)), st.data(), st.sampled_from(["l1", "l2", "value"]))
def test_evict_kv_with_broken_values(site: dict[str, Any], data: st.DataObject, norm: str) -> None:
    """Prevents one overflowed activation from losing the window or from repeating an entry."""
    config = EvictionConfig("n/2", window_size=4, norm=norm)
    kv_len = site["key"].shape[2]
    for bad in (torch.nan, torch.inf, -torch.inf):
        at = data.draw(st.lists(st.integers(0, kv_len - 1), max_size=3), label=str(bad))
        site["value"][:, :, at, 0] = bad
    # A key that spells its own position says what was kept.
    site["key"] = torch.zeros_like(site["key"], dtype=torch.float32)
    site["key"] += torch.arange(kv_len)[:, None]
    site["query"] = site["query"].float() * 0.01
    key, _ = evicted(config, site)
    assert_valid(key[..., 0].long(), config.entries(kv_len), kv_len, 4)


@pytest.mark.parametrize("kv_len", [1, 3, 31, 32])
@pytest.mark.parametrize("norm", ["l1", "l2", "value"])
def test_a_prompt_within_the_window_stays_whole(kv_len: int, norm: str) -> None:
    """Prevents a short prompt from losing entries, or from failing where a window is cut."""
    key = torch.randn(2, 2, kv_len, 8)
    sample = {
        "query": torch.randn(2, 4, kv_len, 8),
        "key": key,
        "value": torch.randn(2, 2, kv_len, 8),
        "weight": torch.randn(16, 32),
        "in_out": False,
    }
    actual = evicted(EvictionConfig(0.1, norm=norm), sample)
    assert torch.equal(actual[0], key) and torch.equal(actual[1], sample["value"])


@pytest.mark.parametrize("capacity", [None, 40, 64])
@pytest.mark.parametrize("method", ["criticalkv", "snapkv"])
def test_a_traced_node_equals_the_eager_one(method: str, capacity: int | None) -> None:
    """Prevents a fake kernel of another shape, and a length baked into the graph."""
    config = EvictionConfig("0.4*n + 5", method, window_size=8)
    module = EvictKV(config, False, from_config=capacity is None)
    given = () if capacity is None else (torch.empty(capacity, 0),)

    def tensors(kv_len: int) -> tuple[Tensor, ...]:
        shapes = ((2, 4, kv_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8), (16, 32))
        return tuple(torch.randn(*shape) for shape in shapes)

    def node(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return module(*tensors[:4], 0.25, 30.0, *tensors[4:])[:2]

    traced = make_fx(node, tracing_mode="symbolic")(*tensors(50), *given)
    for kv_len in (50, 51, 129):
        arguments = (*tensors(kv_len), *given)
        for cut, right in zip(traced(*arguments), node(*arguments), strict=True):
            assert torch.equal(cut, right)
            budget = config.entries(kv_len) if capacity is None else min(capacity, kv_len)
            assert cut.shape == (2, 2, budget, 8)


def test_the_custom_ops_keep_their_promises() -> None:
    """Prevents a fake kernel that lies about shape or dtype, and an op that writes its inputs."""
    base, norm = torch.rand(2, 2, 20), torch.rand(2, 2, 20)
    tests = ("test_schema", "test_faketensor")
    for norms in (norm, None):
        torch.library.opcheck(
            torch.ops.ckv_compile.select.default,
            (base, norms, 9, 3, [1, 2], 1e-4, None, None),
            test_utils=tests,
        )
    value, weight = torch.randn(2, 2, 20, 8), torch.randn(16, 32)
    torch.library.opcheck(
        torch.ops.ckv_compile.projected_norm.default,
        (value, weight, False, 4, False),
        test_utils=tests,
    )
    for quadratic in (False, True):
        torch.library.opcheck(
            torch.ops.ckv_compile.select_by_norm.default,
            (base, value, weight, False, 4, quadratic, 9, 3, [1, 2], 1e-4, None, None),
            test_utils=tests,
        )
