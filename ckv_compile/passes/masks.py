"""Read an attention mask from the ops that build it: causal, causal and padded, or not understood.

The reader evaluates the mask's subgraph over position indices instead of numbers: ``arange`` is an
index along an axis, a comparison of a key index with a query index is the causal predicate, a
look-up of a 2-D tensor by batch and key index is padding. Whatever else it meets it does not guess.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from . import vocabulary as vocab
from .axes import Layout, chain_above, labelled, names_of, text_of, through


@dataclasses.dataclass(frozen=True)
class Index:
    """An integer tensor that counts ``offset, offset + 1, ...`` along the axis labelled I."""

    layout: Layout
    offset: Any


@dataclasses.dataclass(frozen=True)
class Mask:
    """True where attention may look. ``layout`` says along which dimensions it varies (B, Q, K).

    Causal: query ``i`` sees the keys up to ``i + shift``. ``padding`` is the 2-D tensor whose false
    entries hide keys, if there is one: row ``b``, column ``padding_offset + j`` for key ``j``.
    ``additive``: zero where True and very negative elsewhere, to be added to the logits.
    """

    layout: Layout
    is_causal: bool = False
    shift: Any = 0
    padding: Node | None = None
    padding_offset: Any = 0
    additive: bool = False


def read_mask(node: Node, q_len: Any, kv_len: Any, *, additive: bool) -> Mask | str:
    """The causal mask that ``node`` builds for ``[.., q_len, kv_len]``, or why it is not one."""
    mask = _read(node, {})
    if not isinstance(mask, Mask):
        return f"mask {node.name} is built by ops that are not read"
    if mask.additive != additive:
        return f"mask {node.name} is {'added' if additive else 'a condition'}, not so built"
    names, shape = names_of(mask.layout), vocab.shape_of(node) or ()
    if not mask.is_causal or not vocab.known(mask.shift == kv_len - q_len):
        return f"mask {node.name} is not causal"
    if len(shape) < 2 or names[-2:] != ("Q", "K") or any(n not in ("", "B") for n in names[:-2]):
        return f"mask {node.name} has axes {text_of(mask.layout)}, not [.., Q, K]"
    if not (vocab.known(shape[-2] == q_len) and vocab.known(shape[-1] == kv_len)):
        return f"mask {node.name} is {tuple(shape)} for {q_len} queries and {kv_len} keys"
    return mask


def _read(node: object, seen: dict[Node, Index | Mask | None]) -> Index | Mask | None:
    if not isinstance(node, Node):
        return None
    if node not in seen:
        seen[node] = None  # a cycle cannot occur in a graph; this marks work in progress
        seen[node] = _read_op(node, seen)
    return seen[node]


def _read_op(node: Node, seen: dict[Node, Index | Mask | None]) -> Index | Mask | None:
    shape = vocab.shape_of(node)
    if shape is None:
        return None
    if vocab.name_of(node) == "arange":
        return _arange(node, shape)
    if vocab.is_all_true(node):
        return Mask(((),) * len(shape))
    if vocab.name_of(node) == "tril":
        return _tril(node, shape, seen)
    condition = vocab.masking_where(node)
    if condition is not None:
        mask = _read(condition, seen)
        if not isinstance(mask, Mask) or mask.additive:
            return None
        return dataclasses.replace(mask, additive=True)
    if vocab.is_and(node):
        return _both(_read(node.args[0], seen), _read(node.args[1], seen))
    if vocab.is_less_equal(node):
        return _causal(_read(node.args[0], seen), _read(node.args[1], seen))
    if vocab.is_greater_equal(node):
        return _causal(_read(node.args[1], seen), _read(node.args[0], seen))
    if vocab.is_add(node):
        return _shifted(node, seen)
    if vocab.layout_op_of(node) is None and vocab.is_advanced_index(node):
        return _padding(node, seen)
    inner = _read(node.args[0], seen) if node.args else None
    if inner is None:
        return None
    op = vocab.layout_op_of(node)
    if op is None:
        return inner if vocab.is_cast(node) and isinstance(inner, Mask) else None
    # An expand spreads a mask over axes on which it does not depend: there it stays unlabelled.
    expands = op.kind == "expand"
    layout = _spread(inner.layout, len(shape)) if expands else through(op, inner.layout, shape)
    return None if layout is None else dataclasses.replace(inner, layout=layout)


def _arange(node: Node, shape: tuple[Any, ...]) -> Index | None:
    integral = not vocab.value_of(node).is_floating_point()
    return Index(labelled("I", shape), 0) if vocab.is_counting(node) and integral else None


def _tril(node: Node, shape: tuple[Any, ...], seen: dict[Node, Index | Mask | None]) -> Mask | None:
    inner = _read(node.args[0], seen)
    plain = isinstance(inner, Mask) and names_of(inner.layout) == ("",) * len(shape)
    if not plain or vocab.argument(node, 1, "diagonal", 0) != 0 or len(shape) < 2:
        return None
    return Mask(((),) * (len(shape) - 2) + labelled("QK", shape[-2:]), is_causal=True)


def _shifted(node: Node, seen: dict[Node, Index | Mask | None]) -> Index | None:
    index, step = _read(node.args[0], seen), node.args[1]
    if isinstance(step, Node):
        step = vocab.value_of(step)
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
    if len(vocab.shape_of(base) or ()) != 2 or len(index) != 2:
        return None
    batch, key = (_read(item, seen) for item in index)
    if not isinstance(batch, Index) or not isinstance(key, Index):
        return None
    if not vocab.known(batch.offset == 0):
        return None
    layout = _merged(_relabelled(batch.layout, "B"), _relabelled(key.layout, "K"))
    if layout is None:
        return None
    if vocab.is_ones(chain_above(base)[-1]):  # a model that is given no mask may make its own
        return Mask(layout)
    return Mask(layout, padding=base, padding_offset=key.offset)


def _both(first: Index | Mask | None, second: Index | Mask | None) -> Mask | None:
    if not isinstance(first, Mask) or not isinstance(second, Mask):
        return None
    layout = _merged(first.layout, second.layout)
    twice = first.padding is not None and second.padding is not None
    if layout is None or twice or first.additive or second.additive:
        return None
    if first.is_causal and second.is_causal and not vocab.known(first.shift == second.shift):
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
