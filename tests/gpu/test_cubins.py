"""Machine code of every kernel that a GPU would run: it fits into registers and shared memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu.codegen import Code, kernels_in
from gpu.nodes import DECODE, OURS, generated, products
from gpu.offline import shared_memory_limit, usage_of


def assert_fits(code: Code, cc: int) -> None:
    kernels = kernels_in(code)
    assert kernels
    for kernel in kernels:
        usage = usage_of(kernel, cc)
        # Inductor bears a few with its own kernels: it looks for others at 16 words.
        spilled = 0 if kernel.name in (*OURS, *DECODE) else 16 * 4
        assert usage.spilled <= spilled, (kernel.name, usage)
        assert usage.shared <= shared_memory_limit(cc), (kernel.name, usage)


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_kernels_of_the_node_fit(cc: int) -> None:
    """Prevents a kernel that no such GPU can launch, or that keeps its tile in slow memory."""
    assert_fits(generated("plain", cc)[0], cc)


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("name", ["padded", "l2"])
def test_kernels_of_other_nodes_fit(name: str, cc: int) -> None:
    """The same of pads and of the L2 norm."""
    assert_fits(generated(name, cc)[0], cc)


FAST = [(torch.float32, 128, 80)]
SLOW = [
    (dtype, head_dim, cc)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for head_dim in (64, 96, 128, 256)
    for cc in (80, 90, 100)
    if (dtype, head_dim, cc) not in FAST
]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "cc"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_kernels_of_other_layers_fit(dtype: torch.dtype, head_dim: int, cc: int) -> None:
    """Prevents tiles that suit bfloat16 from spilling where a number takes twice the room."""
    assert_fits(products(dtype, head_dim), cc)


def test_a_kernel_that_spills_is_caught() -> None:
    """Prevents the tests above from passing whatever the assembler says."""
    kernels = kernels_in(products(torch.float32, 128))
    kernel = next(kernel for kernel in kernels if kernel.name == "projected_norm_kernel")
    source = kernel.source.replace("'block_k': 32", "'block_k': 256")
    assert source != kernel.source
    usage = usage_of(dataclasses.replace(kernel, source=source), 80)
    assert usage.spilled > 0 or usage.shared > shared_memory_limit(80)
