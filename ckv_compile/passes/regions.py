"""Compile what all layers share once: repeated stretches of a graph become calls of one subgraph.

A decoder is the same layer many times over, and Inductor would schedule, generate and build each
for itself. What stands between two attentions is pure (projections, norms, MLP, rotation), so it
becomes one ``GraphModule`` that is invoked for each layer with that layer's weights. Attention,
eviction and writes to a cache stay where they are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from . import vocabulary as vocab
from .nodes import is_subclass, name_of, value_of

# Shorter stretches gain nothing: a call costs about as much as compiling a few pointwise ops.
_LEAST_NODES = 10
# Says nothing to a compiler; Dynamo puts it in front of modules that are called the first time.
_SAYS_NOTHING = "_log_api_usage_once"

Signature = tuple[Any, ...]
# Consecutive pure nodes.
Stretch = tuple[Node, ...]


def share_regions(gm: GraphModule) -> int:
    """Let repeated stretches of ``gm`` share one subgraph each, in place.

    before: ``layer 0's ops, .., layer n's ops``
    after:  ``invoke_subgraph(region, .., layer 0's tensors), .., invoke_subgraph(region, ..)``

    Two stretches are the same if their ops, constants and inner edges are, and the sizes, strides
    and dtypes of all that enters them, symbols included. What writes to a tensor stays outside, and
    no subgraph returns a view of what it takes.

    Returns:
        How many stretches were replaced.
    """
    if _has_contexts(gm.graph):
        return 0
    groups: dict[Signature, list[Stretch]] = {}
    for stretch in filter(_returns_no_view, _stretches(gm.graph)):
        groups.setdefault(_signature(stretch), []).append(stretch)
    repeated = [group for group in groups.values() if len(group) > 1]
    for number, group in enumerate(repeated):
        name = f"ckv_region_{number}"
        gm.add_submodule(name, _subgraph(group[0]))
        for stretch in group:
            _replace(gm.graph, stretch, name)
    if repeated:
        gm.graph.lint()
        gm.recompile()
    return sum(len(group) for group in repeated)


def _has_contexts(graph: Graph) -> bool:
    """Whether something is switched on or off in mid-graph: a subgraph would be traced under it."""
    return any(
        value_of(node) is None and name_of(node) != _SAYS_NOTHING and not vocab.is_in_place(node)
        for node in graph.nodes
        if node.op == "call_function"
    )


def _stretches(graph: Graph) -> Iterator[Stretch]:
    """The longest runs of pure nodes that can be called, in the graph's order."""
    written = {
        _storage(value_of(other))
        for node in graph.nodes
        if node.op.startswith("call_") and _writes(node)
        for other in node.all_input_nodes[:1]
    }
    apart: set[Node] = set()

    def stays(node: Node) -> bool:
        """Whether it does more than to compute tensors of tensors, or reads what is written to."""
        if node.op not in ("call_function", "call_method") or not all(
            map(_is_operand, _parts(node))
        ):
            return True
        near = (node, *node.all_input_nodes)
        touched = {_storage(value_of(other)) for other in near} - {None}
        unpacks = any(n in apart and not _is_operand(value_of(n)) for n in near)
        return unpacks or _writes(node) or bool(touched & written)

    def is_apart(node: Node) -> bool:
        if stays(node):
            apart.add(node)
        return node in apart

    for outside, nodes in itertools.groupby(list(graph.nodes), is_apart):
        stretch = () if outside else _without_last_views(tuple(nodes))
        if len(stretch) >= _LEAST_NODES and _has_right_ends(stretch):
            yield stretch


def _writes(node: Node) -> bool:
    return vocab.is_in_place(node) or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _without_last_views(stretch: Stretch) -> Stretch:
    """Views at the end are made outside: a call must not return two of one tensor."""
    while stretch:
        last = stretch[-1]
        seen = {_storage(part) for node in last.all_input_nodes for part in _parts(node)} - {None}
        if not seen.issuperset(map(_storage, _parts(last))):
            break
        stretch = stretch[:-1]
    return stretch


def _has_right_ends(stretch: Stretch) -> bool:
    inputs = [value_of(node) for node in _inputs(stretch)]
    taken = all(map(_is_operand, inputs)) and _names_its_symbols(inputs)
    outputs = [value_of(node) for node in _outputs(stretch)]
    return taken and bool(outputs) and all(isinstance(value, Tensor) for value in outputs)


def _names_its_symbols(values: Sequence[Any]) -> bool:
    """Whether each symbol of these sizes is one of them by itself: Inductor reads it off there."""
    sizes = [value for value in values if isinstance(value, torch.SymInt)]
    for value in values:
        if isinstance(value, Tensor):
            sizes += [*value.shape, *value.stride(), value.storage_offset()]
    exprs = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
    alone = {expr for expr in exprs if expr.is_symbol}
    return all(expr.free_symbols <= alone for expr in exprs)


def _inputs(stretch: Stretch) -> tuple[Node, ...]:
    """What it takes from outside, in the order of their first use."""
    above = (node for inner in stretch for node in inner.all_input_nodes)
    inside = set(stretch)
    return tuple(dict.fromkeys(node for node in above if node not in inside))


def _outputs(stretch: Stretch) -> tuple[Node, ...]:
    """What outside takes of it."""
    inside = set(stretch)
    return tuple(node for node in stretch if not inside.issuperset(node.users))


def _parts(node: Node) -> Sequence[Any]:
    """The node's value, or those of the tuple that it is."""
    value = value_of(node)
    return value if isinstance(value, (tuple, list)) else (value,)


def _is_operand(value: object) -> bool:
    """What can be handed to a subgraph: plain tensors and whole numbers."""
    plain = isinstance(value, Tensor) and not is_subclass(value)
    return plain or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool))


def _storage(value: object) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _signature(stretch: Stretch) -> Signature:
    """Equal for stretches that compute the same of their inputs."""
    inputs = _inputs(stretch)
    names = {node: _Name(f"%{i}") for i, node in enumerate((*inputs, *stretch))}

    def of(node: Node) -> Signature:
        return node.op, node.target, repr(map_arg((node.args, node.kwargs), names.__getitem__))

    ends = tuple(_metadata(value_of(node)) for node in inputs)
    returned = tuple(names[node] for node in _outputs(stretch))
    return ends, tuple(of(node) for node in stretch), returned


class _Name(str):
    """Printed without quotes, so that no constant looks like it."""

    def __repr__(self) -> str:
        return str(self)


def _metadata(value: Any) -> Signature:
    if not isinstance(value, Tensor):
        return type(value).__name__, str(value)
    layout = (str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()))
    return *layout, value.dtype, value.device, value.requires_grad, value.layout


def _returns_no_view(stretch: Stretch) -> bool:
    """Whether no output is a view of an input or of another output."""
    inputs = {_storage(value_of(node)) for node in _inputs(stretch)}
    outputs = [_storage(value_of(node)) for node in _outputs(stretch)]
    return len({*outputs}) == len(outputs) and not inputs & {*outputs}


def _subgraph(stretch: Stretch) -> GraphModule:
    """The stretch as a function of its inputs that returns its outputs."""
    graph = Graph()
    copies = {node: graph.placeholder(f"arg_{i}") for i, node in enumerate(_inputs(stretch))}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in _outputs(stretch)))
    return GraphModule(torch.nn.Module(), graph)


def _replace(graph: Graph, stretch: Stretch, name: str) -> None:
    """Call the subgraph ``name`` in the stretch's place."""
    # Read anew: what it takes may come out of a stretch that has been replaced.
    inputs, outputs = _inputs(stretch), _outputs(stretch)
    with graph.inserting_before(stretch[0]):
        operands = (graph.get_attr(name), name, *inputs)
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, operands)
        for i, node in enumerate(outputs):
            part = graph.call_function(operator.getitem, (call, i))
            part.meta = node.meta.copy()
            node.replace_all_uses_with(part)
    for node in reversed(stretch):
        graph.erase_node(node)
