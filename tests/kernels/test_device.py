"""Which bodies a node takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels.device import takes_triton
from ckv_compile.methods.evict import EvictKV


@pytest.mark.parametrize(
    ("device", "lowering", "expected"),
    [
        ("cuda", "auto", True),
        ("cuda", "inductor", True),
        ("cuda", "aot_eager", False),
        ("cuda", "eager", False),
        ("cpu", "inductor", False),
        ("mps", "inductor", False),
    ],
)
def test_triton_is_for_gpus_and_inductor(device: str, lowering: str, expected: bool) -> None:
    """Prevents a kernel for a device that cannot run it, and from a lowering without Triton."""
    tensor: Any = SimpleNamespace(device=torch.device(device))
    assert takes_triton(tensor, lowering) == expected


def test_a_node_on_a_cpu_is_traced_to_ops_of_cpus() -> None:
    """Prevents a choice at run time: the graph holds the bodies of its device alone."""
    node = EvictKV(EvictionConfig(budget=0.5), in_out=False, from_config=True)
    query, key = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    graph = make_fx(node)(query, key, key, torch.randn(32, 32)).graph
    ours = {str(n.target) for n in graph.nodes if "ckv_compile" in str(n.target)}
    names = ("window_attention", "select_by_norm")
    assert ours == {f"ckv_compile.{name}.default" for name in names}
