"""Which tensors of an ATen graph are written in place, through whatever view.

``torch.export`` leaves ``x[:, 0].mul_(2)`` as a view and a write, and every other reader of ``x``
sees it: what a node holds then depends on when it is read. ``run_decompositions({})`` turns it all
into pure functions.
"""

from __future__ import annotations

import operator
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from . import vocabulary as vocab


def written_nodes(gm: GraphModule) -> set[Node]:
    """All nodes that may share memory with something that an op of the graph writes to."""
    roots: dict[Node, Node] = {}

    def root_of(node: Node) -> Node:
        while roots.get(node, node) is not node:
            node = roots[node]
        return node

    written: list[Node] = []
    for node in gm.graph.nodes:
        for source in _aliases_of(node):
            roots[root_of(node)] = root_of(source)
        written += _written_by(node)
    spoilt = {root_of(node) for node in written}
    return {node for node in gm.graph.nodes if root_of(node) in spoilt}


def _aliases_of(node: Node) -> list[Node]:
    """The operands whose memory the result of an ATen op may share."""
    found = [operand for operand, declared in _declared(node) if declared.alias_info is not None]
    # Some return what they are given and do not say so: dropout in eval mode, a piece of a split.
    unsaid = node.target is operator.getitem or vocab.layout_op_of(node) is not None
    return found + ([node.args[0]] if unsaid and isinstance(node.args[0], Node) else [])


def _written_by(node: Node) -> list[Node]:
    """The operands that an ATen op writes to."""
    if not vocab.is_in_place(node):
        return []
    pairs = _declared(node)
    return [arg for arg, said in pairs if said.alias_info is not None and said.alias_info.is_write]


def _declared(node: Node) -> list[tuple[Node, Any]]:
    """An overload's operands, each with what its schema says of it."""
    if not isinstance(node.target, OpOverload):
        return []
    pairs: list[tuple[Node, Any]] = []
    for i, declared in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(declared.name)
        operands = given if isinstance(given, (list, tuple)) else (given,)
        pairs += [(operand, declared) for operand in operands if isinstance(operand, Node)]
    return pairs
