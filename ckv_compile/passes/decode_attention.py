"""Attention of few queries over a cache, given to our kernel for it: see ``kernels/``."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..kernels import decode_attention
from .nodes import annotate, argument, known, value_of

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend_few_queries(graph: Graph) -> int:
    """Replace in ATen, where few queries see the keys of their head; returns how many there were.

    ::

        flash_for_cpu(q [B, H, Q, D], k, v, attn_mask, scale)[0]
        decode_attention(q, k, v, attn_mask, scale)

    Only with as many heads in K and V, nothing causal and no dropout, in the layout that the kernel
    reads, and where nobody asks for the logits' log-sum-exps.
    """
    found = 0
    for node in graph.find_nodes(op="call_function", target=_FLASH):
        read = [part for part in node.users if part.users]
        if [part.args[1] for part in read] != [0] or not _is_for_us(node, read[0]):
            continue
        query, key, value = node.args[:3]
        mask, given = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
        scale = 1 / math.sqrt(value_of(query).shape[3]) if given is None else given
        op = torch.ops.ckv_compile.decode_attention.default
        args = (query, key, value, mask, scale)
        with graph.inserting_before(node):
            made = graph.call_function(op, args)
        annotate(made, op, read[0])
        # Without these Inductor would leave it free what strides the operands have.
        made.meta["eager_input_vals"] = tuple(map_arg(args, value_of)), {}
        read[0].replace_all_uses_with(made)
        for old in (*node.users, node):
            graph.erase_node(old)
        found += 1
    return found


def _is_for_us(node: Node, output: Node) -> bool:
    if argument(node, 3, "dropout_p") or argument(node, 4, "is_causal"):
        return False
    query, key, value = map(value_of, node.args[:3])
    mask = value_of(node.kwargs.get("attn_mask"))
    alike = query.dtype in decode_attention.DTYPES and query.dtype == key.dtype == value.dtype
    few = known(query.shape[2] <= decode_attention.MOST_ROWS)
    heads = known(query.shape[1] == key.shape[1])
    plain = all(known(one.stride(-1) == 1) for one in (key, value, mask) if one is not None)
    # What follows was traced for the layout that this one has.
    same = isinstance(query.shape[3], int) and value_of(output).is_contiguous()
    return alike and few and heads and plain and same
