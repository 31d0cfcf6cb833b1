"""Read einsum, whose equation names the axes: batched products and output projections.

A batched product is spelt as permute and matmul, which is what torch runs for it, bit by bit; so
the readers of attention need to know of matmul alone. A projection is left as it is and read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import vocabulary as vocab
from .nodes import annotate, known, shape_of, value_of


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A tensor and the letters of its axes."""

    node: Node
    axes: str


@dataclasses.dataclass(frozen=True)
class Contraction:
    """``einsum`` of a tensor with a ``weight``: which axes of the one meet which of the other.

    ``met`` maps axes of the tensor to axes of the weight; ``free`` is the weight's other axis.
    ``order`` are the tensor's axes in the result, None for that of the weight.
    """

    weight: Node
    met: dict[int, int]
    free: int
    order: tuple[int | None, ...]


def spell_out_einsums(gm: GraphModule) -> None:
    """Translate batched products of 4-D tensors, in place.

    before: ``einsum("bqhd,bkhd->bhqk", q, k)``
    after:  ``matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3).transpose(2, 3))``
    """
    for node in list(gm.graph.nodes):
        read = _equation_of(node)
        if read is None or not all(
            len(axes) == 4 for axes in (read[0].axes, read[1].axes, read[2])
        ):
            continue
        before = set(gm.graph.nodes)
        with gm.graph.inserting_before(node):
            new = _spelt_out(node, *read)
        if new is not None and _same_strides(node, new):
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        else:
            for unused in reversed([one for one in gm.graph.nodes if one not in before]):
                gm.graph.erase_node(unused)
    gm.graph.lint()
    gm.recompile()


def contraction_of(node: Node, source: Node) -> Contraction | None:
    """How ``node`` projects ``source``, if it is an einsum that does."""
    read = _equation_of(node)
    if read is None or (read[0].node is source) == (read[1].node is source):
        return None
    one, two, result = read
    if two.node is source:
        one, two = two, one
    met = {one.axes.index(axis): i for i, axis in enumerate(two.axes) if axis in one.axes}
    free = [axis for axis in two.axes if axis not in one.axes]
    kept = {axis for axis in one.axes if axis not in two.axes}
    if len(free) != 1 or set(result) != kept | set(free):
        return None
    order = tuple(None if axis in free else one.axes.index(axis) for axis in result)
    return Contraction(two.node, met, two.axes.index(free[0]), order)


def _equation_of(node: Node) -> tuple[_Operand, _Operand, str] | None:
    """Both operands and the result's letters; None for repeated letters, ellipses and the like."""
    found = vocab.einsum_of(node)
    if found is None:
        return None
    text, first, second = found
    operands, _, result = text.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    one, two = _Operand(first, left), _Operand(second, right)
    plain = all(len(set(axes)) == len(axes) and axes.isalpha() for axes in (left, right, result))
    ranked = all(len(x.axes) == len(shape_of(x.node) or ()) for x in (one, two))
    return (one, two, result) if plain and ranked and _agree(one, two) else None


def _agree(one: _Operand, two: _Operand) -> bool:
    """Whether shared axes have provably one size: einsum would repeat a size of 1."""
    sizes = dict(zip(one.axes, shape_of(one.node) or (), strict=True))
    pairs = zip(two.axes, shape_of(two.node) or (), strict=True)
    return all(known(sizes[axis] == size) for axis, size in pairs if axis in sizes)


def _spelt_out(node: Node, one: _Operand, two: _Operand, result: str) -> Node | None:
    """``q k^T`` or ``weights v``: two batch axes, one summed, one free on each side."""
    shared = set(one.axes) & set(two.axes)
    batch = "".join(axis for axis in result if axis in shared)
    free = [axis for axis in result if axis not in shared]
    summed = "".join(shared - set(result))
    if (len(batch), len(free), len(summed)) != (2, 2, 1):
        return None
    if free[0] in two.axes:  # the operands in the order of their free axes in the result
        one, two = two, one
    if free[0] not in one.axes or free[1] not in two.axes:
        return None
    left = _permuted(node, one, batch + free[0] + summed)
    if two.axes.index(summed) < two.axes.index(free[1]):
        right = _permuted(node, two, batch + summed + free[1])
    else:
        right = _permuted(node, two, batch + free[1] + summed)
        right = _call(node, torch.Tensor.transpose, right, 2, 3)
    product = _call(node, torch.matmul, left, right)
    return _permuted(node, _Operand(product, batch + "".join(free)), result)


def _permuted(like: Node, operand: _Operand, axes: str) -> Node:
    if operand.axes == axes:
        return operand.node
    order = (operand.axes.index(axis) for axis in axes)
    return _call(like, torch.Tensor.permute, operand.node, *order)


def _call(like: Node, function: Any, *args: Any) -> Node:
    if function is torch.matmul:
        node = like.graph.call_function(function, args)
    else:
        node = like.graph.call_method(function.__name__, args)
    annotate(node, function, like)
    return node


def _same_strides(one: Node, other: Node) -> bool:
    """Whether the two are alike in memory: a view that follows asks for that."""
    first, second = value_of(one), value_of(other)
    dims = zip(first.shape, first.stride(), second.stride(), strict=True)
    return all(known(size == 1) or known(a == b) for size, a, b in dims)
