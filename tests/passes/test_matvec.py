"""Products of one row: which are spelled out, and that they give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import generated, prompt, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import SETTINGS
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import ckv_compile
from ckv_compile.passes.matvec import spell_out_rows


def spelled(call: Callable[..., Any], *operands: Tensor) -> tuple[GraphModule, int]:
    gm = make_fx(call, tracing_mode="fake")(*operands)
    found = spell_out_rows(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, found


@SETTINGS
@given(st.integers(1, 90), st.integers(1, 90), st.booleans(), st.booleans())
def test_one_row_gives_the_same(width: int, out: int, biased: bool, in_out: bool) -> None:
    operands = [torch.randn(1, 1, width), torch.randn(out, width)]
    if in_out:
        operands[1] = operands[1].T.contiguous()
    if biased:
        operands.append(torch.randn(out))

    def call(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return F.linear(x, weight.T if in_out else weight, *bias)

    gm, found = spelled(call, *operands)
    assert found == 1 and not any("mm" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(*operands), call(*operands), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "operands",
    [
        (torch.randn(2, 8), torch.randn(8, 4)),
        (torch.randn(1, 8).bfloat16(), torch.randn(8, 4).bfloat16()),
        (torch.randn(1, 8).double(), torch.randn(8, 4).double()),
    ],
    ids=["two rows", "bfloat16", "float64"],
)
def test_others_are_left_to_the_library(operands: tuple[Tensor, Tensor]) -> None:
    """Prevents rounded products, and a loop that reads the matrix once for each row."""
    assert spelled(torch.mm, *operands)[1] == 0


def test_scaled_sums_are_left_alone() -> None:
    """addmm(beta, alpha): the scales would be lost."""
    operands = torch.randn(4), torch.randn(1, 8), torch.randn(8, 4)
    assert spelled(lambda b, x, w: torch.addmm(b, x, w, beta=0.5), *operands)[1] == 0


@pytest.mark.parametrize("rewritten", [True, False])
def test_a_decode_step_reads_weights_and_cache_in_loops_of_ours(rewritten: bool) -> None:
    """Prevents a pass that code shared by layers never sees, and an option that does nothing."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="inductor", rewrite_products=rewritten)
    plain = tiny()
    with torch.no_grad():
        cache = model(input_ids=prompt(60)).past_key_values
        _, (code, *_) = run_and_get_code(model, input_ids=prompt(1), past_key_values=cache)
    assert ("extern_kernels.mm(" in code) == (not rewritten)
    assert ("ckv_compile.decode_attention" in code) == rewritten
    ckv_compile.optimize(model, 1.0, lowering="inductor", rewrite_products=rewritten)
    ours, expected = (generated(one, prompt(40), steps=5).sequences for one in (model, plain))
    assert torch.equal(ours, expected)
