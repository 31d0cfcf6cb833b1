"""Keep the last queries beside a cache that is cut while tokens are generated: they score it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..site import AttentionSite
from . import vocabulary as vocab
from .axes import first_above
from .insert import repoint
from .nodes import annotate, outputs_of, shape_of


@torch.library.custom_op("ckv_compile::recent", mutates_args=())
def recent_marker(key: Tensor, recent: Tensor | None) -> Tensor:
    """Ask in a traced graph for the last queries over ``key``, ``[B, H, W, D]``.

    ``recent`` are those of earlier calls. Where no pass has been here there are none.
    """
    return key.new_empty(0)


@recent_marker.register_fake
def _(key: Tensor, recent: Tensor | None) -> Tensor:
    return key.new_empty(0)


class RecentQueries(nn.Module):
    """``ckv_recent_i`` in the graph: the queries of earlier calls and of this one, the last ones.

    Where there were fewer the first one stands in their place: a cut waits until all are known.
    """

    def __init__(self, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size

    def forward(self, query: Tensor, recent: Tensor | None = None) -> Tensor:
        """``[B, H, Q, D]`` to ``[B, H, window_size, D]``."""
        known = query if recent is None else torch.cat([recent, query], dim=2)
        last = torch.arange(self.window_size, device=query.device) + known.shape[2]
        return known.index_select(2, (last - self.window_size).clamp(min=0))

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"window_size={self.window_size}"


def keep_queries(
    gm: GraphModule, sites: Sequence[AttentionSite], window_size: int
) -> dict[int, Node]:
    """Give the cache each site's last queries, and say by the site's index what holds them.

    before: the graph returns an empty tensor
    after:  ``r' = ckv_recent_i(q, r)``, which it returns
    """
    markers = {node.args[0]: node for node in gm.graph.nodes if vocab.is_ours(node, "recent")}
    kept: dict[int, Node] = {}
    for site in sites:
        key = first_above(site.key, markers)
        if key is not None:
            kept[site.index] = _keep(gm, site, markers[key], window_size)
    if kept:
        gm.graph.lint()
        gm.recompile()
    return kept


def _keep(gm: GraphModule, site: AttentionSite, marker: Node, window_size: int) -> Node:
    recent = marker.args[1]
    # A layer that was left alone in an earlier call has none.
    known = len(shape_of(recent) or ()) == 4
    module = RecentQueries(window_size)
    name = f"ckv_recent_{site.index}"
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(site.sdpa):
        args = (site.query, recent) if known else (site.query,)
        node = gm.graph.call_module(name, args)
    annotate(node, module, like=site.sdpa)
    outputs = outputs_of(gm)
    repoint(gm, {i: node for i, value in enumerate(outputs) if value is marker})
    if not marker.users:
        gm.graph.erase_node(marker)
    return node
