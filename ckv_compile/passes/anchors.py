"""All attentions of a graph, whichever way they are written."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..site import Reason, Rejection
from . import vocabulary as vocab
from .attention import Attention, find_attentions
from .flex import find_flex
from .nodes import name_of


def find_anchors(gm: GraphModule) -> list[Attention | Rejection]:
    """Every attention in graph order; those that are not read, or have no K and V, are rejected."""
    closed = [_closed(node) for node in gm.graph.nodes if vocab.is_closed_attention(node)]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found = [*find_attentions(gm), *find_flex(gm), *closed]
    return sorted(found, key=lambda one: order[anchor_of(one)])


def anchor_of(found: Attention | Rejection) -> Node:
    return found.node if isinstance(found, Rejection) else found.anchor


def _closed(node: Node) -> Rejection:
    detail = f"{name_of(node)} makes its K and V inside of itself and hands out neither"
    return Rejection(node, Reason.CACHE_NOT_FOUND, detail)
