"""What Inductor makes of the eviction node for a GPU: which kernels, which memory, no waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu.codegen import Code, inductor_code, kernels_in
from gpu.nodes import BUDGET, KV_LEN, LLAMA, NODES, OURS, generated
from gpu.wrapper import Run, dry_run
from torch import Tensor

# Launches of kernels that Inductor wrote between ours.
OTHERS = {"plain": 6, "l2": 7, "padded": 8}
# What is neither ours nor Inductor's: the Gram matrix, and tokens sorted by being pads.
LIBRARY = {"plain": (), "l2": ("aten.bmm.out",), "padded": ("aten.scatter_.src",)}
NODES_AND_GPUS = [("plain", 80), ("plain", 90), ("plain", 100), ("l2", 90), ("padded", 90)]


def growth(run: Callable[[int], Run]) -> list[float]:
    """Elements by which each buffer grows with one more key."""
    short, long = run(KV_LEN), run(2 * KV_LEN)
    sizes = [[torch.Size(shape).numel() for shape in of.buffers] for of in (short, long)]
    return [(more - less) / KV_LEN for less, more in zip(*sizes, strict=True)]


def node_run(name: str, cc: int, kv_len: int = KV_LEN) -> Run:
    code, _ = generated(name, cc)
    return dry_run(code, NODES[name].args(LLAMA, kv_len, BUDGET, "meta"))


@pytest.mark.parametrize(("name", "cc"), NODES_AND_GPUS)
def test_the_node_is_made_of_our_kernels(name: str, cc: int) -> None:
    """Prevents a body for CPUs on a GPU, one kernel becoming many, and copies between ours."""
    run = node_run(name, cc)
    launches = Counter(run.launches)
    assert {kernel: launches[kernel] for kernel in OURS} == dict.fromkeys(OURS, 1)
    assert len(run.launches) == len(OURS) + OTHERS[name]
    assert run.operators == LIBRARY[name]


@pytest.mark.parametrize(("name", "cc"), NODES_AND_GPUS)
def test_no_buffer_is_as_large_as_the_logits_or_the_projected_values(name: str, cc: int) -> None:
    """Prevents ``[H, W, K]`` and ``[H, K, E]`` in memory: neither is a multiple of K by less."""
    assert max(growth(lambda kv_len: node_run(name, cc, kv_len))) <= LLAMA.heads
    cut = (LLAMA.batch, LLAMA.kv_heads, BUDGET, LLAMA.head_dim)
    assert node_run(name, cc).buffers.count(cut) == 2


@pytest.mark.parametrize(("name", "cc"), NODES_AND_GPUS)
def test_the_host_never_waits_for_the_gpu(name: str, cc: int) -> None:
    """Prevents a value that is read back. A dry run has none to read; here is the text as well."""
    body = generated(name, cc)[0].source.partition("def call(")[2].partition("def get_args")[0]
    for word in (".item(", "_local_scalar_dense", "nonzero", ".tolist(", "cpu", "synchronize"):
        assert word not in body


def test_lengths_are_inputs_of_the_code() -> None:
    """Prevents a prompt's length or a budget from being baked in: each would compile anew."""
    code, _ = generated("plain", 90)
    body = code.source.partition("def call(")[2].partition("def get_args")[0]
    assert str(KV_LEN) not in body and str(BUDGET) not in body
    assert {"L['args'][1].size()[2]", "L['args'][6].size()[0]"} <= set(code.inputs)
    assert len(kernels_in(code)) == len({kernel.variable for kernel in kernels_in(code)})


def _code(fn: Callable[..., Any], args: Sequence[Tensor]) -> Code:
    return inductor_code(fn, args, (KV_LEN,))


def test_a_body_that_materialises_is_caught() -> None:
    """Prevents the test of buffers from passing whatever the code allocates."""

    def norms(value: Tensor, weight: Tensor) -> Tensor:
        return (value @ weight).abs().sum(-1)

    def tensors(kv_len: int) -> list[Tensor]:
        return [torch.empty(shape, device="meta") for shape in ((4, kv_len, 64), (4, 64, 300))]

    code = _code(norms, tensors(KV_LEN))
    assert max(growth(lambda kv_len: dry_run(code, tensors(kv_len)))) == 4 * 300


def test_a_body_that_waits_is_caught() -> None:
    """Prevents the dry run from passing over a copy to the host."""
    args = [torch.empty(KV_LEN, device="meta")]
    code = _code(lambda scores: (scores * 2).cpu(), args)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        dry_run(code, args)
