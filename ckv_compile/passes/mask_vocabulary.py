"""The vocabulary of masks: operator names that say what is seen and what is hidden."""

from __future__ import annotations

from typing import Literal

import torch
from torch.fx import Node

from .nodes import name_of, value_of

_AND = {"and_", "__and__", "iand", "__iand__", "bitwise_and", "logical_and"}
_LESS_EQUAL = {"le", "__le__", "less_equal"}
_GREATER_EQUAL = {"ge", "__ge__", "greater_equal"}


def masking_where(node: Node) -> Node | None:
    """The condition of ``where(condition, 0, very negative)``: an additive mask."""
    filled = hiding_fill(node)
    if filled is not None:
        _, condition, kind = filled
        return condition if kind == "seen" and is_zeros(node.args[1]) else None
    if name_of(node) != "where" or len(node.args) != 3:
        return None
    condition, seen, hidden = node.args
    return condition if seen == 0 and is_very_negative(hidden) else None


def hiding_fill(node: Node) -> tuple[Node, Node, Literal["seen", "hidden"]] | None:
    """``(x, condition, where it is True)`` of ``where(seen, x, low)`` and ``x.masked_fill(hidden,
    low)``, where ``low`` is a number so negative that the softmax makes it 0.
    """
    if len(node.args) != 3:
        return None
    name, kind = name_of(node), "hidden"
    first, second, low = node.args
    if name == "where":
        first, second, kind = second, first, "seen"
    elif name != "masked_fill":
        return None
    tensors = isinstance(first, Node) and isinstance(second, Node)
    return (first, second, kind) if tensors and is_very_negative(low) else None  # type: ignore[return-value]


def is_very_negative(value: object) -> bool:
    """A number below which logits are nothing; float16's minimum is the largest that is used."""
    if isinstance(value, Node) and name_of(value) in ("tensor", "full", "scalar_tensor"):
        at = 1 if name_of(value) == "full" else 0
        value = value.args[at] if len(value.args) > at else None
    return isinstance(value, (int, float)) and value <= -65504


def is_floor(node: Node) -> bool:
    """``max(x, very negative)``: what is hidden stays hidden, the rest what it is."""
    low = node.args[1] if len(node.args) == 2 else None
    return name_of(node) in ("max", "maximum", "clamp_min") and is_very_negative(low)


def is_zeros(node: object) -> bool:
    """A new tensor of zeros."""
    return isinstance(node, Node) and name_of(node) in ("zeros", "new_zeros", "zeros_like")


def is_ones(node: Node) -> bool:
    """A new tensor of ones."""
    return name_of(node) in ("new_ones", "ones", "ones_like")


def is_all_true(node: Node) -> bool:
    """``ones`` of bool, however it is written."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and is_ones(node)


def is_not(node: Node) -> bool:
    return name_of(node) in ("logical_not", "bitwise_not", "invert", "inv", "__invert__")


def is_and(node: Node) -> bool:
    return name_of(node) in _AND


def is_less_equal(node: Node) -> bool:
    return name_of(node) in _LESS_EQUAL


def is_greater_equal(node: Node) -> bool:
    return name_of(node) in _GREATER_EQUAL
