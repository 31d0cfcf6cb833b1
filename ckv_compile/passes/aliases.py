"""Which tensors of an ATen graph are written in place, through whatever view.

``torch.export`` leaves ``x[:, 0].mul_(2)`` as a view and a write, and every other reader of ``x``
sees it: what a node holds then depends on when it is read. ``run_decompositions({})`` turns it all
into pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        for source in vocab.aliases_of(node):
            roots[root_of(node)] = root_of(source)
        written += vocab.written_by(node)
    spoilt = {root_of(node) for node in written}
    return {node for node in gm.graph.nodes if root_of(node) in spoilt}


def upstream(nodes: Iterable[Any]) -> set[Node]:
    """The nodes and all that they are computed from."""
    todo = [node for node in nodes if isinstance(node, Node)]
    seen = set(todo)
    while todo:
        for above in todo.pop().all_input_nodes:
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return seen
