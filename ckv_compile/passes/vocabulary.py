"""The room that spells operator names: what a node of a graph means to the matcher.

Those that masks are written with are spelled beside it, in ``mask_vocabulary.py``, and what does
not depend on the op is read by ``nodes.py``.

Two dialects: Dynamo's, where an op is a method or a function of torch, and ATen of
``torch.export``, where it is an overload with a schema. ATen's plain names are mostly those of
Dynamo, in the same order of arguments; where they differ, both stand here. A new spelling of an op
is one entry in one of the two files and one row in ``tests/passes/test_match.py``.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch._higher_order_ops.flex_attention import flex_attention
from torch._ops import OpOverload
from torch.fx import Node

from .nodes import argument, is_subclass, known, name_of, shape_of, value_of

LayoutKind = Literal["keep", "permute", "regroup", "expand", "interleave"]

_KEEP = {"contiguous", "clone", "to", "type_as", "float", "double", "half", "bfloat16", "detach"}
_KEEP |= {"_to_copy", "alias"}
_REGROUP = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"}
_REGROUP |= {"_unsafe_view"}
_CASTS = {"to", "bool", "type", "contiguous", "clone", "_to_copy"}
# Ops that read a tensor's shape or dtype and none of its numbers.
_MEASURES = {"size", "sym_size", "_assert_tensor_metadata"}
_SUMS = {"add", "__add__", "sub", "__sub__"}
# A part of a tensor, the parts together, or their negatives.
_PARTS = {"getitem", "slice", "narrow", "chunk", "split", "split_with_sizes", "tensor_split"}
_PARTS |= {"unbind", "select", "neg", "negative", "__neg__"}
_CONSTANTS = {"zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty"}
_UPDATES = {"index_copy", "index_put", "scatter", "slice_scatter", "select_scatter"}
_CLOSED = {
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
# Custom ops that multiply their first argument by a quantised matrix, and the position of a bias.
_OPAQUE_LINEAR = {"bitsandbytes.gemm_4bit.default": 6, "bitsandbytes.gemv_4bit.default": 6}
_FULL_SLICES = (slice(None), slice(0, None, None), slice(None, None, 1), slice(0, None, 1))


@dataclasses.dataclass(frozen=True)
class LayoutOp:
    """An op that moves axes and changes no value. ``perm``: new order; ``dim``: what it repeats."""

    kind: LayoutKind
    perm: tuple[int, ...] = ()
    dim: int = 0


def is_sdpa(node: Node) -> bool:
    return node.op == "call_function" and node.target in (
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )


def is_flex(node: Node) -> bool:
    return node.target is flex_attention


def is_closed_attention(node: Node) -> bool:
    """One op for the whole layer, projections included: ``nn.MultiheadAttention`` and the like."""
    return node.op == "call_function" and name_of(node) in _CLOSED


def is_attention(node: Node) -> bool:
    """An attention, or the softmax in the middle of one."""
    return is_sdpa(node) or is_softmax(node) or is_flex(node) or is_closed_attention(node)


def only_sizes(node: Node) -> bool:
    """Whether the numbers among the arguments of ``node`` are sizes of its result and no more."""
    return layout_op_of(node) is not None or name_of(node) in _CONSTANTS


def is_ours(node: Node, op: str = "") -> bool:
    """Whether ``node`` calls an op of this package: that one, or any."""
    return name_of(node).startswith(f"ckv_compile::{op}")


def is_decomposed_attention(node: Node) -> bool:
    """What ``run_decompositions()`` leaves of SDPA and of softmax."""
    name = name_of(node)
    pieces = name == "_softmax" and len(shape_of(node) or ()) == 4
    return pieces or name.startswith("_scaled_dot_product_")


def is_softmax(node: Node) -> bool:
    return name_of(node) in ("softmax", "_softmax") and node.op in ("call_function", "call_method")


def softmax_dim(node: Node) -> Any:
    return argument(node, 1, "dim")


def is_matmul(node: object) -> bool:
    return isinstance(node, Node) and name_of(node) in ("matmul", "__matmul__", "bmm")


def einsum_of(node: Node) -> tuple[str, Node, Node] | None:
    """The equation and the operands of an einsum over two tensors with a written result."""
    if node.op != "call_function" or name_of(node) != "einsum" or node.kwargs:
        return None
    text, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(text, str) or "->" not in text or len(operands) != 2:
        return None
    nodes = [one for one in operands if shape_of(one) is not None]
    return (text, nodes[0], nodes[1]) if len(nodes) == 2 else None


def scaling_of(node: Node) -> tuple[Any, Any, bool] | None:
    """``(x, c, divides)`` if ``node`` is ``x * c`` or ``x / c``, c a number or a scalar node."""
    name = name_of(node)
    times, over = name in ("mul", "__mul__", "imul"), name in ("div", "truediv", "__truediv__")
    rounds = node.kwargs.get("rounding_mode") is not None
    if (not times and not over) or rounds or len(node.args) < 2:
        return None
    inner, factor = node.args[0], node.args[1]
    if times and not isinstance(value_of(inner), torch.Tensor):
        inner, factor = factor, inner
    if not isinstance(value_of(inner), torch.Tensor):
        return None
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    return (inner, factor, over) if number or _is_scalar(factor) else None


def _is_scalar(node: object) -> bool:
    return isinstance(value_of(node), (torch.SymFloat, torch.SymInt, float, int))


def is_shift_by_own_max(node: Node) -> bool:
    """``x - x.max(-1, keepdim=True)``: the softmax of it is that of ``x``."""
    if name_of(node) not in ("sub", "__sub__", "isub") or len(node.args) != 2:
        return False
    source, shift = node.args
    if isinstance(shift, Node) and name_of(shift) == "getitem" and shift.args[1] == 0:
        shift = shift.args[0]
    if not isinstance(shift, Node) or name_of(shift) not in ("max", "amax"):
        return False
    last = argument(shift, 1, "dim") in (-1, (-1,), [-1])
    return last and shift.args[0] is source and argument(shift, 2, "keepdim", False) is True


def drops_last(node: Node) -> bool:
    """``x[..., :-1]``"""
    return name_of(node) == "getitem" and node.args[1] == (Ellipsis, slice(None, -1, None))


def is_dropout(node: Node) -> bool:
    return name_of(node) in ("dropout", "dropout_") and node.op in ("call_function", "call_method")


def is_training_dropout(node: Node) -> bool:
    # F.dropout's own default is training=True.
    return is_dropout(node) and argument(node, 2, "training", True) is not False


def is_cat(node: Node) -> bool:
    return node.op == "call_function" and name_of(node) in ("cat", "concat", "concatenate")


def is_slice_of(node: Node, source: Node) -> bool:
    """Whether ``node`` keeps a part of ``source`` along some axis (a sliding window, say)."""
    if not node.args or node.args[0] is not source or layout_op_of(node) is not None:
        return False
    return name_of(node) in ("narrow", "select", "index_select", "slice", "getitem")


def layout_op_of(node: Node) -> LayoutOp | None:
    """What ``node`` does to the axes of its first argument; None if it is not a layout op."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name, before = name_of(node), shape_of(node.args[0])
    after = value_of(node)
    if before is None or not isinstance(after, torch.Tensor):
        return None
    if name in ("transpose", "swapaxes", "swapdims"):
        perm = list(range(len(before)))
        first, second = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        perm[first], perm[second] = perm[second], perm[first]
        return LayoutOp("permute", perm=tuple(perm))
    if name == "permute":
        dims = node.kwargs.get("dims", node.args[1:])
        if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
            dims = dims[0]
        if not all(isinstance(dim, int) for dim in dims):
            return None
        return LayoutOp("permute", perm=tuple(dim % len(before) for dim in dims))
    transposes = name in ("t", "adjoint", "numpy_T", "mT", "matrix_H")
    if transposes or (name == "getattr" and node.args[1] in ("T", "mT", "H")):
        # Any other rank would need more care than a matrix does.
        return LayoutOp("permute", perm=(1, 0)) if len(before) == 2 else None
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = all(i is None or i is Ellipsis or _is_full_slice(i) for i in index)
        return LayoutOp("regroup") if whole else None
    if name == "slice":
        return LayoutOp("keep") if _is_whole(node, before, tuple(after.shape)) else None
    if is_dropout(node):
        return None if is_training_dropout(node) else LayoutOp("keep")
    if name in _KEEP:
        # A cast to integers drops fractions: that is no mere relayout.
        drops = value_of(node.args[0]).is_floating_point() and not after.is_floating_point()
        return None if drops else LayoutOp("keep")
    if name in _REGROUP:
        reinterprets = any(isinstance(arg, torch.dtype) for arg in node.args)
        return None if reinterprets else LayoutOp("regroup")
    if name in ("expand", "expand_as"):
        return LayoutOp("expand")
    if name == "repeat_interleave":
        repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if not isinstance(repeats, int) or not isinstance(dim, int):
            return None
        return LayoutOp("interleave", dim=dim % len(before))
    return None


def _is_full_slice(index: object) -> bool:
    return isinstance(index, slice) and index in _FULL_SLICES


def _is_whole(node: Node, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether ATen's ``slice`` keeps all: as many as there were, from the first, one by one."""
    dim = argument(node, 1, "dim")
    plain = argument(node, 2, "start") in (None, 0) and argument(node, 4, "step") == 1
    return plain and isinstance(dim, int) and known(before[dim] == after[dim])


def projection_operands(node: Node, source: Node) -> tuple[Node, bool] | None:
    """``(weight, in_out)`` if ``node`` multiplies ``source`` by a matrix from the right."""
    name = name_of(node)
    if node.op != "call_function" and not (node.op == "call_method" and name in ("matmul", "mm")):
        return None
    if name == "linear":
        operand, weight, in_out = argument(node, 0, "input"), argument(node, 1, "weight"), False
    elif name == "addmm":
        operand, weight, in_out = argument(node, 1, "mat1"), argument(node, 2, "mat2"), True
    elif name in ("matmul", "mm", "__matmul__"):
        operand, weight, in_out = node.args[0], argument(node, 1, "other"), True
    else:
        return None
    rank = len(shape_of(weight) or ())
    if operand is not source or not isinstance(weight, Node) or rank != 2:
        return None
    scaled = name == "addmm" and (node.kwargs.get("alpha", 1) != 1)
    return None if scaled else (weight, in_out)


def is_opaque_linear(node: Node, source: Node) -> bool:
    """Whether ``node`` is a linear op that alone can read its weight, applied to ``source``.

    That is a linear with a tensor subclass for a weight, or an op of bitsandbytes.
    """
    if not node.args or node.args[0] is not source:
        return False
    if str(node.target) in _OPAQUE_LINEAR:
        return len(node.args) <= _OPAQUE_LINEAR[str(node.target)]
    wrapped = is_subclass(value_of(argument(node, 1, "weight")))
    return wrapped and name_of(node) in ("linear", "matmul", "mm", "__matmul__")


def weight_alone(node: Node, operand: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for an opaque linear: applied to ``operand``, without its bias."""
    kept = node.args[1:] if str(node.target) in _OPAQUE_LINEAR else node.args[1:2]
    return (operand, *kept), {k: v for k, v in node.kwargs.items() if k != "bias"}


def factor_of(node: Node, source: Node) -> Node | None:
    """The tensor that ``node`` multiplies ``source`` by, element by element."""
    if name_of(node) not in ("mul", "__mul__", "imul", "multiply") or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not source]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    other, shape = value_of(others[0]), shape_of(source)
    # Of another shape, what it multiplies may be spread over new axes.
    same = isinstance(other, torch.Tensor) and shape_of(node) == shape
    return others[0] if same else None


def factors_of(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of which ``node`` is the product, element by element."""
    if name_of(node) not in ("mul", "__mul__", "multiply") or len(node.args) != 2:
        return None
    first, second = node.args
    tensors = [one for one in node.args if isinstance(value_of(one), torch.Tensor)]
    return (first, second) if len(tensors) == 2 else None


def is_angle(node: Node) -> bool:
    """Cosines or sines."""
    return name_of(node) in ("cos", "sin") and node.op in ("call_function", "call_method")


def sums(node: Node) -> bool:
    """The sum or difference of two tensors."""
    return name_of(node) in _SUMS


def linear_operands(node: Node) -> list[Node]:
    """What ``node`` is linear in by itself, entry by entry: its parts, moved, scaled or added.

    Of a sum both tensors; of anything else, a product of tensors among them, nothing.
    """
    if node.op not in ("call_function", "call_method") or not node.args or is_in_place(node):
        return []
    name, first = name_of(node), node.args[0]
    if name in ("cat", "concat", "concatenate", "stack"):
        return list(first) if isinstance(first, (list, tuple)) else []
    if name in _SUMS:
        both = [arg for arg in node.args if isinstance(value_of(arg), torch.Tensor)]
        return both if len(both) == 2 and len(node.args) == 2 and not node.kwargs else []
    scaled = scaling_of(node)
    if scaled is not None:
        return [scaled[0]]
    if name == "getitem" and any(
        isinstance(value_of(n), torch.Tensor) for n in node.all_input_nodes[1:]
    ):
        return []  # chosen by another tensor
    one = name in _PARTS or layout_op_of(node) is not None
    return [first] if one and isinstance(first, Node) else []


def only_measures(node: Node, source: Node) -> bool:
    """Whether ``node`` reads no more of ``source`` than its shape."""
    name = name_of(node)
    named = name in ("view_as", "expand_as", "reshape_as")
    return (named and node.args[0] is not source) or name in _MEASURES


def is_cast(node: Node) -> bool:
    return name_of(node) in _CASTS


def is_add(node: object) -> bool:
    plain = isinstance(node, Node) and node.kwargs.get("alpha", 1) == 1
    return plain and name_of(node) in ("add", "__add__", "iadd")


def is_in_place(node: Node) -> bool:
    """Whether the op writes to its first argument: ``mul_``, ``copy_``, ``setitem``, ``iadd``."""
    if isinstance(node.target, OpOverload):
        # detach_ tells autograd and changes no number.
        return bool(node.target._schema.is_mutable) and name_of(node) != "detach_"
    name = name_of(node)
    augmented = node.target in (operator.iadd, operator.imul, operator.isub, operator.itruediv)
    written = name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_")
    return augmented or written or name == "setitem"


def is_update(node: Node) -> bool:
    """A copy of a tensor with some of its entries replaced: as long as before."""
    return name_of(node) in _UPDATES


def is_advanced_index(node: Node) -> bool:
    written = node.target is operator.getitem and isinstance(node.args[1], tuple)
    return written or name_of(node) == "index"


def is_counting(node: Node) -> bool:
    """``arange(n)``: 0, 1, .., n - 1."""
    if name_of(node) != "arange":
        return False
    if not isinstance(node.target, OpOverload):
        return len(node.args) == 1 and not {"start", "step"} & set(node.kwargs)
    names = [declared.name for declared in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("start", 0) == 0 and given.get("step", 1) == 1
