"""Read an attention mask from the ops that build it: causal, causal and padded, or not understood.

The reader evaluates the mask's subgraph over position indices instead of numbers: ``arange`` is an
index along an axis, a comparison of a key index with a query index is the causal predicate, a
look-up of a 2-D tensor by batch and key index is padding. Whatever else it meets it does not guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..site import Bias
from . import mask_vocabulary as mask_vocab
from . import vocabulary as vocab
from .attention import Term, TermKind
from .axes import Layout, chain_above, labelled, names_of, text_of, through
from .nodes import argument, known, name_of, shape_of, value_of


@dataclasses.dataclass(frozen=True)
class Index:
    """An integer tensor that counts ``offset, offset + 1, ...`` along the axis labelled I."""

    layout: Layout
    offset: Any


@dataclasses.dataclass(frozen=True)
class Mask:
    """Where attention may look. ``layout`` says along which dimensions it varies (B, Q, K).

    Causal: query ``i`` sees the keys up to ``i + shift``. ``padding`` is the 2-D tensor whose false
    entries hide keys, if there is one: row ``b``, column ``padding_offset + j`` for key ``j``.
    ``form``: True where it may look ("seen"), True where it may not ("hidden"), or zero and very
    negative ("added").
    """

    layout: Layout
    is_causal: bool = False
    shift: Any = 0
    padding: Node | None = None
    padding_offset: Any = 0
    form: TermKind = "seen"


def read_terms(
    terms: Iterable[Term], q_len: Any, kv_len: Any
) -> tuple[Mask, tuple[Bias, ...]] | str:
    """The causal mask of ``[.., q_len, kv_len]`` and the biases beside it, or why it is not one."""
    mask: Mask | None = None
    biases: list[Bias] = []
    for term in terms:
        for node, kind in parts_of(term.node, term.kind):
            read = read_mask(node)
            if read is None and kind == "added" and not mask_vocab.is_zeros(node):
                if term.scaled:
                    return f"bias {node.name} is scaled after it is added"
                biases.append(Bias(node, term.merged))
                continue
            if read is None and not mask_vocab.is_zeros(node):
                return f"mask {node.name} is built by ops that are not read"
            if read is None:
                continue
            if read.form != kind:
                return f"mask {node.name} is {kind}, and not built so"
            read = dataclasses.replace(read, form="seen")
            wrong = _fits(read, node, q_len, kv_len)
            if wrong:
                return f"mask {node.name} {wrong}"
            both = read if mask is None else _both(mask, read)
            if both is None:
                return f"mask {node.name} and another one hide different pads"
            mask = both
    names = ", ".join(term.node.name for term in terms)
    if mask is None:
        return f"mask {names} is built by ops that are not read"
    if not mask.is_causal or not known(mask.shift == kv_len - q_len):
        return f"mask {names} is not causal"
    # An axis of one query has no name.
    query_axes = ("Q", "") if known(q_len == 1) else ("Q",)
    if names_of(mask.layout)[-2:] not in [(name, "K") for name in query_axes]:
        return f"mask {names} has axes {text_of(mask.layout)}, not [.., Q, K]"
    return mask, tuple(biases)


def parts_of(node: Node, kind: TermKind) -> Iterator[tuple[Node, TermKind]]:
    """What is added up, or filled in, to make one term: masks and biases."""
    while kind == "added" and _is_float(node):
        op = vocab.layout_op_of(node)
        if op is None or op.kind != "keep":
            break
        node = node.args[0]
    filled = mask_vocab.hiding_fill(node)
    if kind == "added" and filled is not None and mask_vocab.masking_where(node) is None:
        inner, condition, hides = filled
        yield condition, hides
        yield from parts_of(inner, "added")
    elif kind == "added" and vocab.is_add(node) and all(isinstance(a, Node) for a in node.args):
        for operand in node.args:
            yield from parts_of(operand, "added")
    else:
        yield node, kind


def _is_float(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _fits(mask: Mask, node: Node, q_len: Any, kv_len: Any) -> str:
    """What is wrong with the axes of a mask; "" if nothing is."""
    names, shape = names_of(mask.layout), shape_of(node) or ()
    axes = len(shape) >= 2 and names[-2] in ("", "Q") and names[-1] in ("", "K")
    if not axes or any(name not in ("", "B") for name in names[:-2]):
        return f"has axes {text_of(mask.layout)}, not [.., Q, K]"
    for name, size, length in (("Q", shape[-2], q_len), ("K", shape[-1], kv_len)):
        if name in names and not known(size == length):
            return f"is {tuple(shape)} for {q_len} queries and {kv_len} keys"
    return ""


def read_mask(node: Node) -> Mask | None:
    """The mask that ``node`` builds; None if it is not read as one."""
    mask = _read(node, {})
    return mask if isinstance(mask, Mask) else None


def _read(node: object, seen: dict[Node, Index | Mask | None]) -> Index | Mask | None:
    if not isinstance(node, Node):
        return None
    if node not in seen:
        seen[node] = None  # a cycle cannot occur in a graph; this marks work in progress
        seen[node] = _read_op(node, seen)
    return seen[node]


def _read_op(node: Node, seen: dict[Node, Index | Mask | None]) -> Index | Mask | None:
    shape = shape_of(node)
    if shape is None:
        return None
    if name_of(node) == "arange":
        return _arange(node, shape)
    if mask_vocab.is_all_true(node):
        return Mask(((),) * len(shape))
    if name_of(node) == "tril":
        return _tril(node, shape, seen)
    condition = mask_vocab.masking_where(node)
    if condition is not None:
        mask = _read(condition, seen)
        if not isinstance(mask, Mask) or mask.form != "seen":
            return None
        return dataclasses.replace(mask, form="added")
    if mask_vocab.is_not(node):
        return _opposite(_read(node.args[0], seen))
    if mask_vocab.is_and(node):
        return _both(_read(node.args[0], seen), _read(node.args[1], seen))
    if mask_vocab.is_less_equal(node):
        return _causal(_read(node.args[0], seen), _read(node.args[1], seen))
    if mask_vocab.is_greater_equal(node):
        return _causal(_read(node.args[1], seen), _read(node.args[0], seen))
    if vocab.is_add(node):
        return _shifted(node, seen)
    if vocab.layout_op_of(node) is None and vocab.is_advanced_index(node):
        return _padding(node, seen)
    inner = _read(node.args[0], seen) if node.args else None
    if inner is None:
        return None
    if isinstance(inner, Mask) and inner.form == "added" and not _is_float(node):
        # As a condition, what is not 0 is hidden.
        inner = dataclasses.replace(inner, form="hidden") if vocab.is_cast(node) else None
        if inner is None:
            return None
    op = vocab.layout_op_of(node)
    if op is None:
        return inner if vocab.is_cast(node) and isinstance(inner, Mask) else None
    # An expand spreads a mask over axes on which it does not depend: there it stays unlabelled.
    expands = op.kind == "expand"
    layout = _spread(inner.layout, len(shape)) if expands else through(op, inner.layout, shape)
    return None if layout is None else dataclasses.replace(inner, layout=layout)


def _opposite(mask: Index | Mask | None) -> Mask | None:
    forms: dict[TermKind, TermKind] = {"seen": "hidden", "hidden": "seen"}
    if not isinstance(mask, Mask) or mask.form not in forms:
        return None
    return dataclasses.replace(mask, form=forms[mask.form])


def _arange(node: Node, shape: tuple[Any, ...]) -> Index | None:
    integral = not value_of(node).is_floating_point()
    return Index(labelled("I", shape), 0) if vocab.is_counting(node) and integral else None


def _tril(node: Node, shape: tuple[Any, ...], seen: dict[Node, Index | Mask | None]) -> Mask | None:
    inner = _read(node.args[0], seen)
    if not isinstance(inner, Mask) or inner.form != "seen" or any(inner.layout):
        return None
    shift = argument(node, 1, "diagonal", 0)
    shift = value_of(shift) if isinstance(shift, Node) else shift
    if not isinstance(shift, (int, torch.SymInt)) or len(shape) < 2:
        return None
    layout = ((),) * (len(shape) - 2) + labelled("QK", shape[-2:])
    return Mask(layout, is_causal=True, shift=shift)


def _shifted(node: Node, seen: dict[Node, Index | Mask | None]) -> Index | None:
    index, step = _read(node.args[0], seen), node.args[1]
    if isinstance(step, Node):
        step = value_of(step)
    if not isinstance(index, Index) or isinstance(step, bool):
        return None
    if not isinstance(step, (int, torch.SymInt)):
        return None
    return Index(index.layout, index.offset + step)


def _causal(key: Index | Mask | None, query: Index | Mask | None) -> Mask | None:
    """``key position <= query position``, whichever dimensions hold them."""
    if not isinstance(key, Index) or not isinstance(query, Index):
        return None
    layout = _merged(_relabelled(key.layout, "K"), _relabelled(query.layout, "Q"))
    shift = query.offset - key.offset
    return None if layout is None else Mask(layout, is_causal=True, shift=shift)


def _padding(node: Node, seen: dict[Node, Index | Mask | None]) -> Mask | None:
    """``padding[batch, key]`` with plain indices: entry (b, k) says whether that key is real."""
    base, index = node.args
    if len(shape_of(base) or ()) != 2 or len(index) != 2:
        return None
    batch, key = (_read(item, seen) for item in index)
    if not isinstance(batch, Index) or not isinstance(key, Index):
        return None
    if not known(batch.offset == 0):
        return None
    layout = _merged(_relabelled(batch.layout, "B"), _relabelled(key.layout, "K"))
    if layout is None:
        return None
    root = chain_above(base)[-1]
    while vocab.is_cast(root):
        root = chain_above(root.args[0])[-1]
    if mask_vocab.is_ones(root):  # a model that is given no mask may make its own
        return Mask(layout)
    return Mask(layout, padding=base, padding_offset=key.offset)


def _both(first: Index | Mask | None, second: Index | Mask | None) -> Mask | None:
    if not isinstance(first, Mask) or not isinstance(second, Mask):
        return None
    layout = _merged(first.layout, second.layout)
    twice = first.padding is not None and second.padding is not None
    if layout is None or twice or {first.form, second.form} != {"seen"}:
        return None
    if first.is_causal and second.is_causal and not known(first.shift == second.shift):
        return None
    causal, padded = (first if first.is_causal else second), (second if second.padding else first)
    return Mask(layout, causal.is_causal, causal.shift, padded.padding, padded.padding_offset)


def _relabelled(layout: Layout, name: str) -> Layout:
    return tuple(tuple((name, size) for _, size in dim) for dim in layout)


def _spread(layout: Layout, rank: int) -> Layout:
    return ((),) * (rank - len(layout)) + layout


def _merged(first: Layout, second: Layout) -> Layout | None:
    """The layout of two tensors broadcast against each other."""
    rank = max(len(first), len(second))
    dims = []
    for left, right in zip(_spread(first, rank), _spread(second, rank), strict=True):
        if left and right and [n for n, _ in left] != [n for n, _ in right]:
            return None
        dims.append(left or right)
    return tuple(dims)
