"""What Inductor generates for a GPU, as text and as a dry run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu.fake_cuda import fake_cuda
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Code:
    """A graph as Inductor writes it: kernels, and a function ``call`` that launches them.

    Attributes:
        source: the Python module.
        inputs: where ``call`` finds its arguments, as expressions of ``L["args"]``.
    """

    source: str
    inputs: tuple[str, ...]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """What ``call`` takes, tensors and lengths, from what the traced function took."""
        return [eval(name, {"L": {"args": args}}) for name in self.inputs]


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in generated code.

    Attributes:
        name: of the function.
        variable: what ``call`` knows it by.
        source: a Python module with the function.
    """

    name: str
    variable: str
    source: str


class _NotRun(Exception):
    pass


def inductor_code(
    fn: Callable[..., Any], args: Sequence[Any], lengths: Collection[int] = (), cc: int = 90
) -> Code:
    """Inductor's output for ``fn(*args)`` with all tensors on a GPU.

    Args:
        args: real tensors, of which the shapes, strides and dtypes count, None or numbers.
        lengths: dimensions of these sizes are dynamic.
        cc: compute capability of the GPU.
    """
    sources: list[str] = []
    inputs: list[str] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        found = module.graph.find_nodes(op="placeholder")
        inputs.extend(node.meta["grapharg"].source.name for node in found)
        return compile_fx(module, example_inputs)

    def compile_to_module(graph: GraphLowering) -> Any:
        sources.append(graph.codegen()[0].value)

        def call(args: Any) -> None:
            raise _NotRun

        return SimpleNamespace(call=call, __file__="", __name__="")

    def traced(*args: Any) -> Any:
        return fn(*args)

    torch._dynamo.reset()
    with (
        fake_cuda(cc),
        FakeTensorMode(),
        torch.no_grad(),
        config.patch(force_disable_caches=True, compile_threads=1),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
    ):
        fakes = [_fake(arg, lengths) if isinstance(arg, Tensor) else arg for arg in args]
        try:
            torch.compile(traced, fullgraph=True, backend=backend)(*fakes)
        except _NotRun:
            pass
        finally:
            torch._dynamo.reset()
    (source,) = sources
    return Code(source, tuple(inputs))


def _fake(tensor: Tensor, lengths: Collection[int]) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    for axis, size in enumerate(tensor.shape):
        if size in lengths:
            torch._dynamo.mark_dynamic(fake, axis)
    return fake


def kernels_in(code: Code) -> list[Kernel]:
    """The Triton kernels, in the order of their definitions."""
    pattern = r"(\w+) = async_compile\.triton\(\s*'([^']*)',\s*'''(.*?)'''"
    found = re.findall(pattern, code.source, re.DOTALL)
    return [Kernel(name, variable, source) for variable, name, source in found]
