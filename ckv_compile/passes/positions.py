"""Positions that a model counts by the length of its own cache: wrong once the cache is cut.

A cache of ours says how many tokens it has seen. A plain one, a pair of tensors or an attribute,
has nothing but its length, which after a cut is that of what was kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from ..site import AttentionSite, Reason, Rejection
from . import vocabulary as vocab
from .attention import Term
from .masks import read_terms
from .nodes import value_of


def without_counting_caches(
    sites: Sequence[AttentionSite], rejections: Sequence[Rejection]
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Reject later calls that would be wrong behind a cut cache.

    Their query or key is made of a number that is the cache's length; or their mask is not made of
    it. Masks rightly are: they say which of the entries that are there may be seen. So the search
    ends at every attention. A length that is no symbol cannot be told from a constant.
    """
    left: list[AttentionSite] = []
    lengths: set[Any] = set()  # of all caches: positions are often taken from the first layer's
    for site in sites:
        if _can_shrink(site):
            lengths |= free_symbols(site.kv_len) - free_symbols(site.q_len)
    for site in sites:
        node, mask = _made_of(lengths, site), _unaligned(site)
        if node is not None:
            detail = f"{node.name} is made of the length of a cache such as {site.cache_key.name}"
            rejections = (*rejections, Rejection(node, Reason.POSITIONS, detail, site.name))
        elif mask:
            rejections = (*rejections, Rejection(site.sdpa, Reason.POSITIONS, mask, site.name))
        else:
            left.append(site)
    # Numbered anew, as their eviction nodes are.
    again = (dataclasses.replace(site, index=i) for i, site in enumerate(left))
    return tuple(again), tuple(rejections)


def _unaligned(site: AttentionSite) -> str:
    """What is wrong with the mask of several tokens behind a cache; empty for nothing.

    Positions of tokens compared with slots of the cache let a token see those that follow it, once
    the cache has fewer slots than there were tokens before it.
    """
    if site.phase != "continuation" or not site.key_outputs or site.attn_mask is None:
        return ""
    value = value_of(site.attn_mask)
    seen = isinstance(value, torch.Tensor) and value.dtype == torch.bool
    term = Term(site.attn_mask, site.sdpa, "seen" if seen else "added")
    mask = read_terms((term,), site.q_len, site.kv_len)
    return f"several tokens behind a cache: {mask}" if isinstance(mask, str) else ""


def _can_shrink(site: AttentionSite) -> bool:
    return site.phase != "prefill" and bool(site.key_outputs)


def _made_of(lengths: set[Any], site: AttentionSite) -> Node | None:
    """The first op found that puts one of the lengths into the site's query or key."""
    if not lengths or not _can_shrink(site):
        return None
    todo, seen = [site.query, site.key], {site.query, site.key}
    while todo:
        node = todo.pop()
        if vocab.is_attention(node):
            continue
        if not vocab.only_sizes(node) and any(free_symbols(n) & lengths for n in _numbers(node)):
            return node
        for above in node.all_input_nodes:
            if above not in seen and isinstance(value_of(above), (torch.Tensor, tuple)):
                seen.add(above)
                todo.append(above)
    return None


def _numbers(node: Node) -> Iterator[Any]:
    """The symbolic numbers among the arguments of a node."""
    for above in node.all_input_nodes:
        value = value_of(above)
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            yield value
