"""Attention over K and V that are made, token by token, of what the cache holds (MLA).

DeepSeek's latent attention caches one latent and one rotary key for all heads, and projects them
up to K and V at each call. Evicting a token there takes it from every head, so all that has to be
proved is that entry ``j`` of K and V depends on nothing but entry ``j`` of the cached tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from . import vocabulary as vocab
from .axes import chain_above
from .nodes import argument, known, name_of, shape_of


def sources_of(node: Node, axis: int, is_cached: Callable[[Node], bool]) -> set[Node] | None:
    """The cached tensors ``[B, h, K, D]`` whose axis K becomes ``axis`` of ``node``.

    None if an op in between mixes tokens, or is not known not to.
    """
    if is_cached(node) and len(shape_of(node) or ()) == 4:
        return {node} if axis == 2 else None
    step = _above(node, axis)
    if step is None:
        return None
    found: set[Node] = set()
    for above, at in step:
        sources = sources_of(above, at, is_cached)
        if sources is None:
            return None
        found |= sources
    return found


def _above(node: Node, axis: int) -> list[tuple[Node, int]] | None:
    """The operands that hold tokens, and where; None for an op that is not read."""
    name, shape = name_of(node), shape_of(node)
    if shape is None:
        return None
    if name in ("new_empty", "empty", "empty_like"):
        return _written(node, axis, shape)
    if not node.args:
        return None
    first = node.args[0]
    if name in ("cat", "concat", "concatenate"):
        dim = argument(node, 1, "dim", 0)
        apart = isinstance(dim, int) and dim % len(shape) != axis
        return [(item, axis) for item in first] if apart else None
    if name == "getitem" and isinstance(first, Node):
        pieces = _split_axis(first)
        if pieces is not None:  # one of the pieces of a split
            return [(first.args[0], axis)] if pieces != axis else None
        return [(first, axis)] if _slices_last_only(node) and axis < len(shape) - 1 else None
    if name == "linear":
        weight = argument(node, 1, "weight")
        fixed = isinstance(weight, Node) and chain_above(weight)[-1].op in (
            "placeholder",
            "get_attr",
        )
        return [(first, axis)] if fixed and axis < len(shape) - 1 else None
    if name in ("add", "mul"):  # a linear layer and its LoRA
        scaling = vocab.scaling_of(node)
        parts = node.args if scaling is None and name == "add" else (scaling or ())[:1]
        return [(part, axis) for part in parts] if _alike(parts, shape) else None
    if name == "expand":
        before = shape_of(first) or ()
        at = axis - (len(shape) - len(before))
        same = at >= 0 and known(before[at] == shape[axis])
        return [(first, at)] if same else None
    op = vocab.layout_op_of(node)
    if op is None:
        return None
    if op.kind == "keep":
        return [(first, axis)]
    if op.kind == "permute":
        return [(first, op.perm[axis])]
    return _regrouped(first, axis, shape) if op.kind == "regroup" else None


def _alike(parts: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    """Whether an op goes through tensors of one shape element by element."""
    shapes = [shape_of(part) for part in parts]
    return bool(shapes) and all(
        found is not None
        and len(found) == len(shape)
        and all(known(a == b) for a, b in zip(found, shape, strict=True))
        for found in shapes
    )


def _regrouped(first: Node, axis: int, shape: tuple[Any, ...]) -> list[tuple[Node, int]] | None:
    """Through a view: an axis is the same one if as much stands before it."""
    before = shape_of(first) or ()
    for at, size in enumerate(before):
        ahead = known(_product(before[:at]) == _product(shape[:axis]))
        if ahead and known(size == shape[axis]):
            return [(first, at)]
    return None


def _product(sizes: tuple[Any, ...]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _split_axis(node: Node) -> int | None:
    """Along which axis ``node`` splits a tensor into pieces; None if it does not."""
    if name_of(node) not in ("split", "chunk", "split_with_sizes", "tensor_split"):
        return None
    dim, shape = argument(node, 2, "dim", 0), shape_of(node.args[0])
    return dim % len(shape) if isinstance(dim, int) and shape else None


def _slices_last_only(node: Node) -> bool:
    """``x[..., a:b]``"""
    index = node.args[1]
    return (
        isinstance(index, tuple)
        and len(index) == 2
        and index[0] is Ellipsis
        and isinstance(index[1], slice)
    )


def _written(node: Node, axis: int, shape: tuple[Any, ...]) -> list[tuple[Node, int]] | None:
    """A new tensor that is filled by copies into parts of its last axis."""
    written: list[tuple[Node, int]] = []
    width: Any = 0
    for part in node.users:
        if name_of(part) != "getitem" or not _slices_last_only(part):
            if vocab.is_in_place(part):
                return None
            continue  # somebody reads it
        for copy in part.users:
            source = copy.args[1] if len(copy.args) == 2 else None
            same = shape_of(source) == shape_of(part)
            if name_of(copy) != "copy_" or not isinstance(source, Node) or not same:
                return None
            written.append((source, axis))
            width = width + (shape_of(part) or (0,))[-1]
    whole = known(width == shape[-1]) and axis < len(shape) - 1
    return written if written and whole else None
