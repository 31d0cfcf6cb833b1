"""Products of one row with a matrix, spelled out for Inductor to write the loop.

A decode step of one sequence multiplies one row with every weight of the model: reading the weights
is all there is to do. The libraries that PyTorch calls for it on CPUs do so at a quarter to two
thirds of the speed of a copy.

Inductor has a pass for it as well (``decompose_mm_pass``), for matrices of at most 2,048 x 2,048.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import annotate, known, value_of

_aten = torch.ops.aten


def spell_out_rows(graph: Graph) -> int:
    """Replace in ATen, where ``x`` is one row of float32 on a CPU; returns how many there were.

    ::

        mm(x [1, K], w [K, N])             sum(x * w^T, 1)[None]
        addmm(b [N], x [1, K], w [K, N])   (sum(x * w^T, 1) + b)[None]
    """
    found = 0
    for op in (_aten.mm.default, _aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=op):
            *bias, row, matrix = node.args
            if node.kwargs or not _is_one_row(row, matrix):
                continue
            with graph.inserting_before(node):
                made = _Maker(graph, node)
                turned = made(_aten.permute.default, matrix, [1, 0])
                total = made(_aten.sum.dim_IntList, made(_aten.mul.Tensor, row, turned), [1])
                for one in bias:
                    total = made(_aten.add.Tensor, total, one)
                replaced = made(_aten.reshape.default, total, [1, -1])
            # Made once, not again for each of the N sums.
            for operand in (row, matrix):
                operand.meta["inductor_realize_to_strides"] = True
            node.replace_all_uses_with(replaced)
            graph.erase_node(node)
            found += 1
    return found


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Calls in the place of another."""

    graph: Graph
    like: Node

    def __call__(self, op: Callable[..., Any], *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        annotate(node, op, self.like)
        return node


def _is_one_row(row: object, matrix: object) -> bool:
    x, w = value_of(row), value_of(matrix)
    tensors = isinstance(x, torch.Tensor) and isinstance(w, torch.Tensor)
    if not tensors or not (x.dim() == w.dim() == 2 and x.dtype == w.dtype == torch.float32):
        return False
    return x.device.type == w.device.type == "cpu" and known(x.shape[0] == 1)
