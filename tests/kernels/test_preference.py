"""CAKE's preference of a layer against the oracle."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOAT32_STEP, site
from torch.fx.experimental.proxy_tensor import make_fx

from ckv_compile.kernels import attention_rows, reference_packed
from ckv_compile.kernels.layer_preference import layer_preference

LENGTHS = st.integers(1, 24) | st.sampled_from([33, 63])


@settings(deadline=None, max_examples=40)
@given(
    site(LENGTHS),
    st.data(),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([None, 0.05]),
    st.sampled_from([0, 1 << 22]),
)
def test_layer_preference(
    site: dict[str, Any], data: st.DataObject, window: int, scale: float | None, block: int
) -> None:
    """Prevents pads or the window's own keys among those that count, a causal edge that is off,
    and a variance that depends on how the queries are split; 0 bytes are one query a block."""
    query, key = site["query"], site["key"]
    batch, kv_len = len(key), key.shape[2]
    query = query[:, :, data.draw(st.integers(0, kv_len - 1)) :]
    real = None
    if data.draw(st.booleans()):
        at = torch.arange(kv_len)
        pads = torch.tensor([[data.draw(st.integers(0, kv_len))] for _ in range(batch)])
        real = at >= pads if data.draw(st.booleans()) else at < kv_len - pads
    with mock.patch.object(attention_rows, "_BLOCK_BYTES", block):
        actual = layer_preference(query, key, scale, window, real)
    expected = reference_packed.layer_preference(query, key, scale, window, real)
    assert (actual.dtype, actual.shape) == (torch.float32, (batch,))
    # A logit is off by some rounding steps of its terms; exp makes that a relative error, and the
    # variance of keys that all queries see alike is made of such errors alone.
    widest = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    step = 64 * FLOAT32_STEP * (8 + float(widest) * factor)
    heads = query.shape[1]
    noise = (heads * min(window, kv_len) * 5) ** (1 / 1.6) * (heads * step**2) ** (1 / 0.6)
    assert ((actual - expected).abs() <= 4 * step * expected + noise + step**2).all()


def test_a_mean_that_is_far_larger_than_its_spread() -> None:
    """Prevents mean squares less a squared mean: of a sink that all see they leave rounding."""
    torch.manual_seed(0)
    query, key = 0.02 * torch.randn(1, 1, 40, 8), torch.zeros(1, 1, 40, 8)
    query[..., 0] += 20.0
    key[..., 0, 0] = 1.0
    for block in (0, 1 << 22):
        with mock.patch.object(attention_rows, "_BLOCK_BYTES", block):
            actual = layer_preference(query, key, None, 16).double()
        expected = reference_packed.layer_preference(query, key, None, 16)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0.0)


def test_lengths_stay_symbolic() -> None:
    """Prevents one graph for each prompt length."""

    def tensors(kv_len: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, 4, kv_len, 8), torch.randn(2, 2, kv_len, 8)

    traced = make_fx(lambda q, k: layer_preference(q, k, None, 4), tracing_mode="symbolic")(
        *tensors(20)
    )
    for kv_len in (20, 21, 70):
        given = tensors(kv_len)
        assert torch.equal(traced(*given), layer_preference(*given, None, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_keeps_its_promises(dtype: torch.dtype) -> None:
    """Prevents a fake kernel that lies about shape or dtype, and an op that writes its inputs."""
    query, key = torch.randn(2, 4, 20, 8, dtype=dtype), torch.randn(2, 2, 20, 8, dtype=dtype)
    torch.library.opcheck(
        torch.ops.ckv_compile.layer_preference.default,
        (query, key, 0.3, 4, None),
        test_utils=("test_schema", "test_faketensor"),
    )
