"""Named axes: push labels through layout ops and read what is left at the other end.

A layout is a tuple of dimensions, each a tuple of ``(label, size)`` factors, slowest first:
``[B, Q, H*D]`` is ``((B,), (Q,), (H, D))``. Factors of size 1 carry no order and are dropped, so
that a batch of one and a single head need no special case.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch.fx import Node

from .nodes import known, shape_of
from .vocabulary import LayoutOp, layout_op_of

Factor = tuple[str, Any]
Layout = tuple[tuple[Factor, ...], ...]


def labelled(names: Sequence[str], sizes: Sequence[Any]) -> Layout:
    """One label per dimension: ``labelled("BHQD", shape)``."""
    return tuple(
        () if known(size == 1) else ((name, size),) for name, size in zip(names, sizes, strict=True)
    )


def names_of(layout: Layout) -> tuple[str, ...]:
    """``("B", "Q", "HD")``; a dimension of size 1 reads ``""``."""
    return tuple("".join(name for name, _ in dim) for dim in layout)


def text_of(layout: Layout | None) -> str:
    if layout is None:
        return "axes lost"
    return "[" + ", ".join("*".join(name for name, _ in dim) or "1" for dim in layout) + "]"


def through(op: LayoutOp, layout: Layout, after: Sequence[Any]) -> Layout | None:
    """The layout behind ``op``, whose result has the sizes ``after``; None if axes get mixed."""
    if op.kind == "keep":
        return layout
    if op.kind == "permute":
        return tuple(layout[dim] for dim in op.perm)
    if op.kind == "regroup":
        return _regroup(layout, after)
    if op.kind == "expand":
        return _expand(layout, after)
    return _interleave(layout, op.dim, after)


def follow(layout: Layout | None, path: Iterable[Node]) -> Layout | None:
    """The layout at the end of a chain of layout nodes."""
    for node in path:
        op, after = layout_op_of(node), shape_of(node)
        if layout is None or op is None or after is None:
            return None
        layout = through(op, layout, after)
    return layout


def chain_above(node: Node) -> list[Node]:
    """``node`` and what it is a mere relayout of, from ``node`` upwards."""
    chain = [node]
    while layout_op_of(chain[-1]) is not None and isinstance(chain[-1].args[0], Node):
        chain.append(chain[-1].args[0])
    return chain


def first_above(node: Node, among: Container[Node]) -> Node | None:
    """The first of ``among`` that ``node`` is, or is a mere relayout of."""
    return next((above for above in chain_above(node) if above in among), None)


def upstream(nodes: Iterable[Any]) -> set[Node]:
    """The nodes and all that they are computed from."""
    todo = [node for node in nodes if isinstance(node, Node)]
    seen = set(todo)
    while todo:
        for above in todo.pop().all_input_nodes:
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return seen


def _size_of(factors: Iterable[Factor]) -> Any:
    product: Any = 1
    for _, size in factors:
        product = product * size
    return product


def _regroup(layout: Layout, after: Sequence[Any]) -> Layout | None:
    factors = [factor for dim in layout for factor in dim]
    result: list[tuple[Factor, ...]] = []
    for size in after:
        taken: list[Factor] = []
        # Sizes are at least 2, so the product grows with each factor and stops at one place only.
        while not known(_size_of(taken) == size):
            if not factors or known(_size_of(taken) > size):
                return None
            taken.append(factors.pop(0))
        result.append(tuple(taken))
    return None if factors else tuple(result)


def _expand(layout: Layout, after: Sequence[Any]) -> Layout | None:
    grown = ((),) * (len(after) - len(layout)) + layout
    result: list[tuple[Factor, ...]] = []
    for dim, size in zip(grown, after, strict=True):
        if not dim and not known(size == 1):
            result.append((("G", size),))
        elif known(_size_of(dim) == size):
            result.append(dim)
        else:
            return None
    return tuple(result)


def _interleave(layout: Layout, dim: int, after: Sequence[Any]) -> Layout | None:
    before = _size_of(layout[dim])
    if known(after[dim] == before):
        return layout
    if not isinstance(after[dim], int) or not isinstance(before, int) or after[dim] % before:
        return None
    group: Factor = ("G", after[dim] // before)
    return (*layout[:dim], (*layout[dim], group), *layout[dim + 1 :])
