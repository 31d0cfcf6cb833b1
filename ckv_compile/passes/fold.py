"""Undo the repetition of K and V over groups where one query asks: decode without copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from ..site import AttentionSite
from . import vocabulary as vocab
from .axes import chain_above
from .nodes import annotate, known, shape_of


def fold_groups(gm: GraphModule, sites: Sequence[AttentionSite]) -> tuple[AttentionSite, ...]:
    """Let the queries of a group stand behind each other; returns the sites that it changed.

    before: ``k, v -> repeat [B, Hkv*G, K, D] -> sdpa(q [B, Hkv*G, 1, D])``
    after:  ``k, v -> sdpa(q [B, Hkv, G, D])``, which is the same product with no copy of the cache

    Only for one query, for which every key of a group's head is every query's: nothing is causal,
    and a mask ``[B or 1, 1, 1, K]`` says the same of all. The order of heads, group within KV head,
    is what the matcher has proved of the repetition.
    """
    folded = tuple(site for site in sites if _is_foldable(site))
    for site in folded:
        _fold(gm, site)
    if folded:
        gm.graph.lint()
        gm.recompile()
    return folded


def _is_foldable(site: AttentionSite) -> bool:
    node = site.sdpa
    repeated = site.num_key_value_groups > 1 and not site.latent
    if site.phase != "decode" or not repeated or not vocab.is_sdpa(node):
        return False
    if site.is_causal:
        return False
    if site.attn_mask is None:
        return True
    shape = shape_of(site.attn_mask) or ()
    return len(shape) == 4 and known(shape[1] == 1) and known(shape[2] == 1)


def _fold(gm: GraphModule, site: AttentionSite) -> None:
    graph, heads = gm.graph, (site.num_key_value_heads, site.num_key_value_groups)
    with graph.inserting_before(site.sdpa):
        split = graph.call_method("unflatten", (site.query, 1, heads))  # [B, Hkv, G, 1, D]
        query = graph.call_method("flatten", (split, 2, 3))
        args = (query, site.cache_key, site.cache_value, site.attn_mask)
        folded = graph.call_function(F.scaled_dot_product_attention, args, {"scale": site.scale})
        result = graph.call_method("unflatten", (folded, 2, (heads[1], 1)))
        output = graph.call_method("flatten", (result, 1, 2))
    for new in (split, query, folded, result, output):
        method = new.op == "call_method"
        annotate(new, getattr(torch.Tensor, new.target) if method else new.target, site.sdpa)
    site.sdpa.replace_all_uses_with(output)
    graph.erase_node(site.sdpa)
    # Not eliminate_dead_code: a write into the cache's buffer has no users either.
    for operand in (site.key, site.value):
        for node in chain_above(operand):
            if not node.users and vocab.layout_op_of(node) is not None:
                graph.erase_node(node)
