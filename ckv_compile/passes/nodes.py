"""What a reader of graphs asks of any node, whatever its op: value, shape, name, arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def value_of(node: object) -> Any:
    """The example value (a fake tensor) of a node, or None."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def shape_of(node: object) -> tuple[Any, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def annotate(node: Node, call: Callable[..., Any], like: Node) -> None:
    """Give a new node what the tracer gives its own: the example value, and whence it comes.

    Args:
        call: computes the node's value from those of its arguments.
        like: the node in whose place it stands.
    """
    derive(node, like)
    values = torch.fx.node.map_arg(node.args, value_of)
    named = torch.fx.node.map_arg(node.kwargs, value_of)
    key = "val" if "val" in like.meta else "example_value"
    with fake_mode_of([value_of(other) for other in (*node.all_input_nodes, like)]):
        node.meta[key] = call(*values, **named)


def derive(node: Node, like: Node) -> None:
    """Say of a new node that it comes from the same line and module as another."""
    for copied in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if copied in like.meta:
            node.meta[copied] = like.meta[copied]


def is_size(node: Node, size: Any) -> bool:
    """Whether ``node`` is an int that is known to be ``size``."""
    value = value_of(node)
    return isinstance(value, (int, torch.SymInt)) and known(value == size)


def is_parameter(node: Node) -> bool:
    """Whether an input of the graph is a parameter of the model."""
    return isinstance(value_of(node), nn.Parameter)


def outputs_of(gm: GraphModule) -> tuple[Any, ...]:
    """What the graph returns, in order."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return tuple(output.args[0])


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The mode of the first fake tensor; without one a context that does nothing."""
    # Not detect_fake_mode: inside a backend that finds the mode of the example inputs, which is a
    # younger one than that of the graph's example values (both share their symbols).
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    return next(modes, contextlib.nullcontext())


def known(condition: Any) -> bool:
    """Whether a comparison of symbolic sizes is provable; never adds a guard."""
    return bool(statically_known_true(condition))


def name_of(node: Node) -> str:
    """The op's plain name, whichever way it is called; '' for inputs and outputs."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if isinstance(node.target, (OpOverload, OpOverloadPacket)):
            # Of another library's op the whole name: its "linear" may be anything.
            return _qualified_name(node.target).removeprefix("aten::")
        return str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        return "call_module"
    return ""


def _qualified_name(op: OpOverload | OpOverloadPacket) -> str:
    return str(op._schema.name if isinstance(op, OpOverload) else op._qualified_op_name)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """A call's argument by position or by keyword; an ATen op's schema knows name and default."""
    if len(node.args) > position:
        return node.args[position]
    if isinstance(node.target, OpOverload) and position < len(node.target._schema.arguments):
        declared = node.target._schema.arguments[position]
        return node.kwargs.get(declared.name, declared.default_value)
    return node.kwargs.get(name, default)


def is_subclass(value: object) -> bool:
    """Whether a value is a tensor made of other tensors, such as torchao's quantised weights."""
    return is_traceable_wrapper_subclass(value)


def called(node: Node) -> Callable[..., Any]:
    """What a node calls."""
    return getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
