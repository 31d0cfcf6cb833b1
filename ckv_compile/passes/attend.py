"""Attention over a cut cache whose heads have different lengths: read it where it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..kernels.device import takes_triton
from ..kernels.ragged_attention import ragged_attention
from ..site import AttentionSite
from . import vocabulary as vocab
from .axes import first_above
from .nodes import annotate


@torch.library.custom_op("ckv_compile::prefix", mutates_args=())
def prefix_marker(
    key: Tensor, packed_key: Tensor, packed_value: Tensor, cu_kv_lens: Tensor
) -> Tensor:
    """Say in a traced graph that packed entries stand before those of ``key`` ``[B, Hkv, t, D]``.

    The pass takes the marker out again.

    Raises:
        RuntimeError: it is run, so no pass has been here.
    """
    raise RuntimeError(_unread("the call"))


@prefix_marker.register_fake
def _(key: Tensor, packed_key: Tensor, packed_value: Tensor, cu_kv_lens: Tensor) -> Tensor:
    return cu_kv_lens.new_empty(0)


def _unread(what: str) -> str:
    return (
        f"ckv_compile: {what} does not read what is kept of the prompt in packed form; continue "
        "the cache with the optimised model, or take allocation='uniform'"
    )


class AttendPacked(nn.Module):
    """``ckv_attend_i`` in the graph: see :func:`ckv_compile.kernels.ragged_attention`."""

    def __init__(self, is_causal: bool, lowering: str) -> None:
        super().__init__()
        self.is_causal, self.lowering = is_causal, lowering

    def forward(
        self,
        query: Tensor,
        packed_key: Tensor,
        packed_value: Tensor,
        cu_kv_lens: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scale: Any = None,
    ) -> Tensor:
        """``[B, H, Q, Dv]``, as the attention that it stands for."""
        triton = takes_triton(query, self.lowering)
        return ragged_attention(
            query, packed_key, packed_value, cu_kv_lens, key, value, mask, self.is_causal, scale,
            triton,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"is_causal={self.is_causal}, lowering={self.lowering}"


def take_prefixes(gm: GraphModule) -> dict[Node, tuple[Node, Node, Node]]:
    """What stands before the keys of each layer; the markers are taken out."""
    found = {}
    for node in list(gm.graph.nodes):
        if vocab.is_ours(node, "prefix"):
            found[node.args[0]] = tuple(node.args[1:])
            gm.graph.erase_node(node)
    return found


def attend_packed(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    prefixes: dict[Node, tuple[Node, Node, Node]],
    lowering: str,
) -> tuple[AttentionSite, ...]:
    """Put the packed entries before the tail that each attention reads; returns the other sites.

    before: ``sdpa(q, repeat(k), repeat(v), mask)`` over the tail
    after:  ``ckv_attend_i(q, K, V, cu, k, v, mask)``

    Raises:
        NotImplementedError: an attention is not understood, and would miss the prompt.
    """
    owners: dict[Node, AttentionSite] = {}
    for site in sites:
        key = first_above(site.key, prefixes)
        if key is not None:
            owners[key] = site
    for key in prefixes:
        owner = owners.get(key)
        if owner is None or owner.latent or not vocab.is_sdpa(owner.sdpa):
            raise NotImplementedError(_unread(f"attention over {key}"))
    for key, site in owners.items():
        _attend(gm, site, prefixes[key], lowering)
    if owners:
        gm.graph.lint()
        gm.recompile()
    return tuple(site for site in sites if site not in owners.values())


def _attend(
    gm: GraphModule, site: AttentionSite, prefix: tuple[Node, Node, Node], lowering: str
) -> None:
    name = f"ckv_attend_{site.index}"
    module = AttendPacked(site.is_causal, lowering)
    gm.add_submodule(name, module)
    tail = (site.cache_key, site.cache_value)
    with gm.graph.inserting_before(site.sdpa):
        args = (site.query, *prefix, *tail, site.attn_mask, site.scale)
        node = gm.graph.call_module(name, args)
    annotate(node, module, like=site.sdpa)
    site.sdpa.replace_all_uses_with(node)
    gm.graph.erase_node(site.sdpa)
