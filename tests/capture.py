"""Graphs of small attentions, Dynamo's and torch.export's, for tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.export import ExportedProgram
from torch.fx import GraphModule

BATCH, HEADS, KV_HEADS, Q_LEN, HEAD_DIM = 2, 4, 2, 12, 16
HIDDEN = HEADS * HEAD_DIM


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> GraphModule:
    """The one graph that Dynamo makes of ``fn(*args)`` without gradients.

    ``dynamic`` makes the length of every ``[B, H, Q, D]`` argument symbolic, and of what ``fn``
    closes over whatever ``torch.compile(dynamic=True)`` makes so.
    """
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)

        def run(*inputs: Any) -> Any:
            gm.meta["inputs"] = inputs  # for tests that run the graph once more
            return gm(*inputs)

        return run

    def fresh(*inputs: Any) -> Any:
        return fn(*inputs)

    # Dynamo counts the compiles of a code object, and after 256 it takes no more.
    fresh.__code__ = fresh.__code__.replace()
    for arg in args if dynamic else ():
        if arg.dim() == 4:
            torch._dynamo.mark_dynamic(arg, 2)
    # Arguments with dynamic=True would have symbolic heads as well.
    everything = dynamic and not args
    compiled = torch.compile(
        fresh, backend=backend, dynamic=everything, fullgraph=True, isolate_recompiles=True
    )
    with torch.no_grad():
        compiled(*args)
    (graph,) = graphs
    return graph


class Called(torch.nn.Module):
    """A module that calls ``fn``, for torch.export takes no functions."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def exported(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> ExportedProgram:
    """What torch.export makes of ``fn(*args)``; ``dynamic`` as for :func:`captured`."""
    shapes = None
    if dynamic:
        length = {2: torch.export.Dim.DYNAMIC}
        shapes = (tuple(length if arg.dim() == 4 else None for arg in args),)
    with torch.no_grad():
        return torch.export.export(Called(fn), args, dynamic_shapes=shapes)


def qkv(kv_heads: int = HEADS, q_len: int = Q_LEN) -> tuple[torch.Tensor, ...]:
    """Random query, key and value, ``[B, H or Hkv, Q, D]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, q_len, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def weight() -> torch.Tensor:
    return torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))


def attention(
    *,
    sdpa: Callable[..., Any] | None = None,
    repeat: Callable[..., Any] = lambda x: x,
    merge: Callable[..., Any] = lambda o: o.transpose(1, 2).reshape(*o.shape[:1], -1, HIDDEN),
    project: Callable[..., Any] = F.linear,
    cached: Callable[..., Any] = lambda k, v: (k, v),
    prepare: Callable[..., Any] = lambda x: x * 2,
) -> Callable[..., Any]:
    """A causal attention whose every part can be replaced; returns output, K and V."""
    sdpa = sdpa or (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> Any:
        # Dynamo returns an untouched input outside of the graph: a cache is computed. The sum with
        # the query makes their symbolic lengths one, as they are in a model.
        k, v = (prepare(x + 0 * q[:, : x.shape[1]]) for x in (k, v))
        out = sdpa(q, repeat(k), repeat(v))
        return project(merge(out), w), *cached(k, v)

    return forward
