"""Which attention is given to the kernel for few queries, and that it gives the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from families import generated, prompt, tiny
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import ckv_compile
from ckv_compile.kernels.cpu import few_queries as cpp
from ckv_compile.passes.decode_attention import attend_few_queries

QUERY, KEY, VALUE = torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 4, 40, 16)
MASK = torch.zeros(2, 1, 1, 40).masked_fill(torch.arange(40) < 5, -math.inf)


def rewritten(call: Callable[..., Any], *operands: Tensor) -> tuple[GraphModule, int]:
    with torch.no_grad():
        gm = make_fx(call, tracing_mode="fake")(*operands)
    found = attend_few_queries(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, MASK, MASK == 0], ids=["no mask", "added", "bool"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_few_queries_give_the_same(dtype, mask, scale) -> None:
    operands = [one.to(dtype) for one in (QUERY, KEY, VALUE)]
    if mask is not None:
        operands.append(mask if mask.dtype == torch.bool else mask.to(dtype))

    def call(*given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*given, scale=scale)

    gm, found = rewritten(call, *operands)
    assert found == 1 and "flash" not in gm.code
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gm(*operands), call(*operands), rtol=4 * step, atol=4 * step)


def turned(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A query whose heads are strides, several rows: PyTorch's result has its layout."""
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value)


def transposed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys as some models store them, [B, H, D, K]."""
    return F.scaled_dot_product_attention(query, key.mT.contiguous().mT, value)


def with_sums(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Its only query sees the first key."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize(
    ("call", "query", "heads"),
    [
        (F.scaled_dot_product_attention, torch.randn(2, 4, 9, 16), 4),
        (F.scaled_dot_product_attention, QUERY.double(), 4),
        (turned, torch.randn(2, 3, 4, 16), 4),
        (transposed, QUERY, 4),
        (with_sums, QUERY, 4),
        (causal, QUERY, 4),
        (lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True), QUERY, 2),
    ],
    ids=[
        "nine queries",
        "float64",
        "another layout",
        "transposed keys",
        "log-sum-exps",
        "causal",
        "grouped",
    ],
)
def test_others_are_left_to_pytorch(call, query, heads) -> None:
    operands = query, *(one[:, :heads].to(query.dtype) for one in (KEY, VALUE))
    assert rewritten(call, *operands)[1] == 0


def test_inductor_keeps_the_layout_of_the_operands() -> None:
    """Seen: it left out a copy that makes keys contiguous, and the kernel is not for others."""
    key = torch.randn(2, 4, 16, 50)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, (key.mT + 1).contiguous(), value)

    operands = torch.randn(2, 4, 1, 16), key, torch.randn(2, 4, 50, 16)
    compiled = torch.compile(call, backend="criticalkv", options={"budget": 1.0})
    with torch.no_grad(), mock.patch.object(cpp, "attend_dense", wraps=cpp.attend_dense) as asked:
        torch.testing.assert_close(compiled(*operands), call(*operands))
    assert asked.called


def test_decode_steps_of_padded_batches_attend_by_the_kernel() -> None:
    """Prevents a pass that compiled models never reach."""
    model, plain = tiny(), tiny()
    ckv_compile.optimize(model, 1.0, lowering="inductor")
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    ours, expected = (
        generated(one, ids, steps=5, attention_mask=mask).sequences for one in (model, plain)
    )
    assert torch.equal(ours, expected)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
        more = torch.cat([mask, mask[:, -1:]], 1)
        step = {"input_ids": ids[:, :1], "attention_mask": more, "past_key_values": cache}
        _, (code, *_) = run_and_get_code(model, **step)
    assert "ckv_compile.decode_attention" in code
