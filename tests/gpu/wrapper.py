"""Runs the host part of Inductor's GPU code on another device."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu.codegen import Code
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[list[Any]], tuple[Tensor, ...]]


def load(source: str, device: str) -> Call:
    """``call`` of a generated module, its tensors on ``device`` instead of a GPU."""
    replaced = (
        (r"from torch._C import _cuda_getCurrentRawStream as (\w+)", r"\1 = lambda index: 0"),
        (
            r"empty_strided_cuda = .*",
            "empty_strided_cuda = lambda size, stride, dtype: "
            f"torch.empty_strided(size, stride, dtype=dtype, device='{device}')",
        ),
        (r"torch\.cuda\._DeviceGuard\(0\)", "__import__('contextlib').nullcontext()"),
        (r"torch\.cuda\.set_device\(0\)", "pass"),
        (r"device\(type='cuda', index=0\)", f"device(type='{device}')"),
    )
    for pattern, replacement in replaced:
        source = re.sub(pattern, replacement, source)
    assert "torch.cuda" not in source
    names: dict[str, Any] = {"__name__": "generated", "__file__": "generated.py"}
    exec(compile(source, "<generated>", "exec"), names)
    return names["call"]


@dataclass(frozen=True)
class Run:
    """What happened, in order, as ``call`` ran.

    Attributes:
        launches: names of the Triton kernels launched.
        operators: names of the library functions called, allocations aside.
        buffers: shapes of all that was allocated, outputs too.
    """

    launches: tuple[str, ...]
    operators: tuple[str, ...]
    buffers: tuple[tuple[int, ...], ...]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.buffers: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            if func is not torch.ops.aten.empty_strided.default:
                self.operators.append(str(func))
            if "out" not in (kwargs or {}):
                parts = result if isinstance(result, tuple | list) else [result]
                self.buffers += [part for part in parts if isinstance(part, Tensor)]
        return result


def dry_run(code: Code, args: Sequence[Any]) -> Run:
    """Runs the host part on meta tensors: all shapes are right, and no data is there.

    Reading a value on the host (``item``, ``nonzero``, a copy to the CPU) raises, for a meta tensor
    has none: code that runs dry never waits for the GPU.
    """
    launches: list[str] = []

    def triton(self: AsyncCompile, name: str, source: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(run=lambda *args, **kwargs: launches.append(name))

    metas = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    with mock.patch.object(AsyncCompile, "triton", triton):
        call = load(code.source, "meta")
    with _Recorder() as recorder:
        call(code.arguments(metas))
    shapes = tuple(tuple(buffer.shape) for buffer in recorder.buffers)
    return Run(tuple(launches), tuple(recorder.operators), shapes)
