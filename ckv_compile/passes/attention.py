"""Anchors: every attention of a graph, whether one SDPA call or a softmax between two products.

Both give the same :class:`Attention`; what comes after does not ask which it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from ..site import Reason, Rejection
from . import mask_vocabulary as mask_vocab
from . import vocabulary as vocab
from .axes import chain_above, follow, labelled, names_of
from .nodes import argument, known, name_of, shape_of, value_of

# "added" to the logits; where True they are "seen" alone, or "hidden".
TermKind = Literal["added", "seen", "hidden"]


@dataclasses.dataclass(frozen=True)
class Term:
    """A mask or a bias: ``node``, broadcast against ``[B, H, Q, K]``, which ``user`` reads.

    ``merged``: it is ``[B*H, Q or 1, K]``, for there the logits have three dimensions. ``scaled``:
    the logits are scaled, or capped, after it has come to them.
    """

    node: Node
    user: Node
    kind: TermKind
    merged: bool = False
    scaled: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """``softmax(softcap(scale * q k^T) + terms) v``, the softmax over the keys and the sinks.

    ``output`` is the node that holds ``[B, H, Q, Dv]``, ``anchor`` the SDPA or the softmax.
    ``scale`` None means ``1/sqrt(D)``; numbers may be nodes. ``sinks`` ``[H]`` are logits of one
    more key for each head, which has no value.
    """

    anchor: Node
    output: Node
    query: Node
    key: Node
    value: Node
    terms: tuple[Term, ...]
    is_causal: Any
    scale: Any
    softcap: Any = None
    sinks: Node | None = None
    dropout_p: Any = 0.0


def find_attentions(gm: GraphModule) -> Iterator[Attention | Rejection]:
    """Every attention in graph order; a softmax over ``[B, H, Q, K]`` that is not read is rejected.

    A softmax of another rank, or whose result is not multiplied by a value, is none of ours (a
    router of experts, say).
    """
    for node in gm.graph.nodes:
        if vocab.is_sdpa(node):
            yield _sdpa(node)
        elif vocab.is_softmax(node) and len(shape_of(node) or ()) in (3, 4):
            found = _eager(node)
            if found is not None:
                yield found


def _sdpa(node: Node) -> Attention:
    query, key, value = (
        argument(node, i, name) for i, name in enumerate(("query", "key", "value"))
    )
    attn_mask = argument(node, 3, "attn_mask")
    mask_value = value_of(attn_mask)
    seen = isinstance(mask_value, torch.Tensor) and mask_value.dtype == torch.bool
    term = () if attn_mask is None else (Term(attn_mask, node, "seen" if seen else "added"),)
    return Attention(
        anchor=node,
        output=node,
        query=query,
        key=key,
        value=value,
        terms=term,
        is_causal=argument(node, 5, "is_causal", False),
        scale=argument(node, 6, "scale"),
        dropout_p=argument(node, 4, "dropout_p", 0.0),
    )


class _Unread(Exception):
    """Why a softmax between two products is not read; never leaves this file."""


def _eager(softmax: Node) -> Attention | Rejection | None:
    """Read ``matmul, scale, soft cap, mask, softmax, dropout, matmul`` from the middle outwards."""
    if vocab.softmax_dim(softmax) not in (-1, len(shape_of(softmax) or ()) - 1):
        return None
    product, sinks_dropped, blocked = _product_below(softmax)
    if product is None or blocked is not None:
        return blocked
    try:
        logits = _Logits(softmax.args[0])
        if sinks_dropped != (logits.sinks is not None):
            raise _Unread("the column that is dropped of its weights is not that of the sinks")
        return Attention(
            anchor=softmax,
            output=_viewed_as_four(product),
            query=_of_four(logits.query),
            key=_of_four(logits.key),
            value=_of_four(product.args[1]),
            terms=tuple(logits.terms),
            is_causal=False,
            scale=logits.scale,
            softcap=logits.softcap,
            sinks=logits.sinks,
        )
    except _Unread as why:
        detail = f"softmax {softmax.name}: {why}"
        return Rejection(softmax, Reason.ATTENTION_UNREADABLE, detail)


def _product_below(softmax: Node) -> tuple[Node | None, bool, Rejection | None]:
    """The product of the weights with the values, whether it lacks their last column, and what
    forbids to read it as attention; no product where this is none."""
    weights, dropped = softmax, False
    blocked: Rejection | None = None
    while True:
        user = _only_user(weights)
        if user is None:
            return None, dropped, None
        if vocab.is_matmul(user):
            return (user if user.args[0] is weights else None), dropped, blocked
        if vocab.is_training_dropout(user):
            dropout_p = argument(user, 1, "p", 0.5)
            detail = f"{user.name} drops attention weights with p={dropout_p}"
            reason = Reason.DROPOUT if dropout_p else Reason.TRAINING
            blocked = Rejection(user, reason, detail)
        elif vocab.drops_last(user) and not dropped:
            dropped = True
        elif not _keeps(user):
            if vocab.layout_op_of(user) is None:
                return None, dropped, None
            detail = f"softmax {softmax.name}: {user.name} stands before the product"
            blocked = Rejection(softmax, Reason.ATTENTION_UNREADABLE, detail)
        weights = user


class _Logits:
    """What stands above a softmax, read upwards to the product of queries and keys."""

    def __init__(self, node: Any) -> None:
        self.terms: list[Term] = []
        self.softcap: Any = None
        self.sinks: Node | None = None
        factors: list[_Factor] = []
        while not (isinstance(node, Node) and vocab.is_matmul(node)):
            if not isinstance(node, Node):
                raise _Unread(f"{node} stands between the product and the softmax")
            above = self._step(node, factors)
            if above is None:
                detail = f"{node.name} ({name_of(node)}) stands before the softmax"
                raise _Unread(detail)
            node = above
            if name_of(node) == "baddbmm":
                factors += self._baddbmm(node)
                break
        self.scale = _product(factors)
        if self.scale is None:
            raise _Unread("its scale is more than one factor")
        self._operands(node)

    def _step(self, node: Node, factors: list[_Factor]) -> Any:
        """What ``node`` is made of, its part in the logits noted; None if it has none."""
        scaled = vocab.scaling_of(node)
        if scaled is not None:
            above, factor, divides = scaled
            factors.append(_factor(factor, divides))
            return above
        if vocab.is_add(node):
            return self._add(node, scaled=bool(factors))
        hiding = mask_vocab.hiding_fill(node)
        if hiding is not None:
            above, condition, kind = hiding
            self._term(condition, node, kind, scaled=bool(factors))
            return above
        if name_of(node) == "tanh":
            return self._cap(node, factors)
        if _keeps(node) or mask_vocab.is_floor(node) or vocab.is_shift_by_own_max(node):
            return node.args[0]
        if vocab.is_cat(node) and self.sinks is None:
            return self._cat(node)
        return None

    def _add(self, node: Node, *, scaled: bool) -> Any:
        """The operand in which the product is; the other one is added to it."""
        first, second = node.args[0], node.args[1]
        if _has_product(second) and not _has_product(first):
            first, second = second, first
        if not isinstance(second, Node):
            raise _Unread(f"{node.name} adds {second}")
        self._term(second, node, "added", scaled=scaled)
        return first

    def _term(self, term: Node, user: Node, kind: TermKind, *, scaled: bool) -> None:
        merged = len(shape_of(user) or ()) == 3
        scaled = scaled or self.softcap is not None
        self.terms.append(Term(term, user, kind, merged, scaled))

    def _cap(self, node: Node, factors: list[_Factor]) -> Any:
        above, inner = _factors(node.args[0])
        cap = _product(factors)
        outside = [term for term in self.terms if not term.scaled]
        if self.softcap is not None or cap is None or len(outside) < len(self.terms):
            raise _Unread("its soft cap is more than one factor")
        if not inner or not _inverse(inner.pop(0), cap):
            raise _Unread("tanh(x / cap) is not multiplied by the same cap")
        self.softcap = cap
        factors[:] = inner
        return above

    def _cat(self, node: Node) -> Any:
        """``cat([logits, sinks])``: one more column, the same for every query."""
        parts = argument(node, 0, "tensors")
        if argument(node, 1, "dim", 0) not in (-1, 3) or len(parts) != 2:
            return None
        logits, column = parts
        root = chain_above(column)[-1]
        size = shape_of(root) or ()
        heads = (shape_of(logits) or (0, 0))[1]
        path = chain_above(column)[:-1][::-1]
        spread = follow(labelled("H", size), path) if len(size) == 1 else None
        if spread is None or names_of(spread)[1:2] != ("H",) or not known(size[0] == heads):
            raise _Unread(f"{column.name} is no logit for each head")
        self.sinks = root
        return logits

    def _baddbmm(self, node: Node) -> list[_Factor]:
        beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
        if beta != 1:
            raise _Unread(f"{node.name} has beta={beta}")
        self._term(node.args[0], node, "added", scaled=False)
        return [alpha]

    def _operands(self, product: Node) -> None:
        at = 1 if name_of(product) == "baddbmm" else 0
        self.query = argument(product, at, "batch1")
        transposed = argument(product, at + 1, "batch2")
        op = vocab.layout_op_of(transposed) if isinstance(transposed, Node) else None
        last_two = ((0, 2, 1), (0, 1, 3, 2))
        if op is None or op.kind != "permute" or op.perm not in last_two:
            raise _Unread("the product is not q k^T")
        self.key = transposed.args[0]


def _has_product(node: Any) -> bool:
    """Whether the product of queries and keys is above, as far as the logits are followed."""
    while isinstance(node, Node):
        if vocab.is_matmul(node) or name_of(node) == "baddbmm":
            return True
        scaled = vocab.scaling_of(node)
        if scaled is not None:
            node = scaled[0]
        elif vocab.is_add(node):
            return _has_product(node.args[0]) or _has_product(node.args[1])
        elif (filled := mask_vocab.hiding_fill(node)) is not None:
            node = filled[0]
        elif _keeps(node):
            node = node.args[0]
        else:
            return False
    return False


def _keeps(node: Node) -> bool:
    """Whether ``node`` is its first argument: cast, dropped out in eval mode, or viewed."""
    op = vocab.layout_op_of(node)
    return op is not None and (op.kind == "keep" or _merges_heads(node))


def _merges_heads(node: Node) -> bool:
    """Whether ``node`` views ``[B, H, Q, *]`` as ``[B*H, Q, *]``, or back."""
    op = vocab.layout_op_of(node)
    if op is None or op.kind != "regroup":
        return False
    shapes = sorted((shape_of(node.args[0]) or (), shape_of(node) or ()), key=len)
    if [len(shape) for shape in shapes] != [3, 4]:
        return False
    three, four = shapes
    product = known(three[0] == four[0] * four[1])
    return product and all(known(three[i] == four[i + 1]) for i in (1, 2))


def _viewed_as_four(product: Node) -> Node:
    """Where a product ``[B*H, Q, D]`` becomes ``[B, H, Q, D]``; one of four dimensions is it."""
    if len(shape_of(product) or ()) != 3:
        return product
    user = _only_user(product)
    if user is None or not _merges_heads(user):
        raise _Unread(f"{product.name} is not viewed as [B, H, Q, D]")
    return user


def _of_four(node: Any) -> Any:
    """``[B, H, Q, D]`` of what is seen as ``[B*H, Q, D]``; whatever has four dimensions is it."""
    while isinstance(node, Node) and len(shape_of(node) or ()) == 3:
        if not _keeps(node):
            raise _Unread(f"{node.name} is not made of [B, H, Q, D]")
        node = node.args[0]
    return node


def soft_cap_of(node: Node) -> tuple[Node, Node | float, Node | float | None] | None:
    """``(x, scale, cap)`` if ``node`` is ``cap * tanh(scale * x / cap)``, or ``scale * x``."""
    inner, factors = _factors(node)
    softcap = None
    if isinstance(inner, Node) and name_of(inner) == "tanh":
        softcap = _product(factors)
        inner, factors = _factors(inner.args[0])
        if softcap is None or not factors or not _inverse(factors.pop(0), softcap):
            return None
    scale = _product(factors)
    return None if scale is None or not isinstance(inner, Node) else (inner, scale, softcap)


# A factor: a number, or a scalar node and whether it divides.
_Factor = float | tuple[Node, bool]


def _factors(node: Any) -> tuple[Any, list[_Factor]]:
    """Peel factors off ``node``, the last one first."""
    factors: list[_Factor] = []
    while isinstance(node, Node) and (scaled := vocab.scaling_of(node)) is not None:
        node, factor, divides = scaled
        factors.append(_factor(factor, divides))
    return node, factors


def _factor(factor: Any, divides: bool) -> _Factor:
    if isinstance(factor, Node):
        return factor, divides
    return 1 / factor if divides else factor


def _product(factors: list[_Factor]) -> Node | float | None:
    """All factors as one: a number, or one lone node; None where it would take arithmetic."""
    if all(isinstance(factor, (int, float)) for factor in factors):
        return math.prod(factors)
    if len(factors) == 1 and isinstance(factors[0], tuple) and not factors[0][1]:
        return factors[0][0]
    return None


def _inverse(factor: _Factor, of: Node | float) -> bool:
    if isinstance(factor, tuple) or isinstance(of, Node):
        return factor == (of, True)
    return math.isclose(factor * of, 1.0)


def _only_user(node: Node) -> Node | None:
    # Models that can return their attention weights list them as an output as well.
    users = [u for u in node.users if u.op != "output" and not vocab.only_measures(u, node)]
    return users[0] if len(users) == 1 else None
