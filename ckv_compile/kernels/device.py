"""Which bodies the eviction node takes."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def takes_triton(tensor: Tensor, lowering: str) -> bool:
    """Whether kernels for the tensor's device are Triton's: decided while the graph is traced.

    Other lowerings than Inductor keep to PyTorch's own ops, on every device.
    """
    if lowering in ("eager", "aot_eager") or tensor.device.type not in ("cuda", "xpu"):
        return False
    return importlib.util.find_spec("triton") is not None
