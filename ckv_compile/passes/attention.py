"""Anchors: every attention of a graph, whether one SDPA call or a softmax between two products.

Both give the same :class:`Attention`; what comes after does not ask which it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..site import Reason, Rejection
from . import vocabulary as vocab


@dataclasses.dataclass(frozen=True)
class Attention:
    """``softmax(softcap(scale * q k^T) + mask) v``.

    ``output`` is the node that holds ``[B, H, Q, Dv]``, ``anchor`` the SDPA or the softmax.
    ``scale`` None means ``1/sqrt(D)``; numbers may be nodes. ``additive`` says how the mask acts:
    added to the logits, or hiding where it is False.
    """

    anchor: Node
    output: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Any
    is_causal: Any
    additive: bool
    scale: Any
    softcap: Any = None
    dropout_p: Any = 0.0


def find_attentions(gm: GraphModule) -> Iterator[Attention | Rejection]:
    """Every attention in graph order; a softmax over ``[B, H, Q, K]`` that is not read is rejected.

    A softmax of another rank, or whose result is not multiplied by a value, is none of ours (a
    router of experts, say).
    """
    for node in gm.graph.nodes:
        if vocab.is_sdpa(node):
            yield _sdpa(node)
        elif vocab.is_softmax(node) and len(vocab.shape_of(node) or ()) == 4:
            found = _eager(node)
            if found is not None:
                yield found


def _sdpa(node: Node) -> Attention:
    query, key, value = (
        vocab.argument(node, i, name) for i, name in enumerate(("query", "key", "value"))
    )
    attn_mask = vocab.argument(node, 3, "attn_mask")
    mask_value = vocab.value_of(attn_mask)
    return Attention(
        anchor=node,
        output=node,
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        is_causal=vocab.argument(node, 5, "is_causal", False),
        additive=isinstance(mask_value, torch.Tensor) and mask_value.dtype != torch.bool,
        scale=vocab.argument(node, 6, "scale"),
        dropout_p=vocab.argument(node, 4, "dropout_p", 0.0),
    )


def _eager(softmax: Node) -> Attention | Rejection | None:
    """Read ``matmul, scale, soft cap, mask, softmax, dropout, matmul`` from the middle outwards."""
    weights = softmax
    product = _only_user(weights)
    while product is not None and (vocab.is_cast(product) or vocab.is_dropout(product)):
        if vocab.is_training_dropout(product):
            dropout_p = vocab.argument(product, 1, "p", 0.5)
            detail = f"{product.name} drops attention weights with p={dropout_p}"
            reason = Reason.DROPOUT if dropout_p else Reason.TRAINING
            return Rejection(product, reason, detail)
        weights, product = product, _only_user(product)
    if vocab.softmax_dim(softmax) not in (-1, 3):
        return None
    if product is not None and vocab.layout_op_of(product) is not None:
        return _unread(softmax, f"{product.name} stands before the product with the values")
    if product is None or not vocab.is_matmul(product) or product.args[0] is not weights:
        return None
    logits: Any = softmax.args[0]
    attn_mask = softcap = None
    # A mask hides alike whether it is added before the scaling or after it.
    masked, outer = _factors(logits)
    if vocab.is_add(masked):
        logits, attn_mask = masked.args[0], masked.args[1]
    else:
        outer = []
    logits, factors = _factors(logits)
    factors = outer + factors
    if isinstance(logits, Node) and vocab.name_of(logits) == "tanh":
        softcap = _product(factors)
        logits, factors = _factors(logits.args[0])
        if softcap is None or not factors or not _inverse(factors.pop(0), softcap):
            return _unread(softmax, "tanh(x / cap) is not multiplied by the same cap")
    scale = _product(factors)
    if scale is None:
        return _unread(softmax, "its scale is more than one factor")
    if not isinstance(logits, Node) or not vocab.is_matmul(logits):
        return _unread(softmax, f"{logits} stands between the product and the softmax")
    query, transposed = logits.args[0], logits.args[1]
    op = vocab.layout_op_of(transposed) if isinstance(transposed, Node) else None
    if op is None or op.kind != "permute" or op.perm != (0, 1, 3, 2):
        return _unread(softmax, "the product is not q k^T")
    return Attention(
        anchor=softmax,
        output=product,
        query=query,
        key=transposed.args[0],
        value=product.args[1],
        attn_mask=attn_mask,
        is_causal=False,
        additive=True,
        scale=scale,
        softcap=softcap,
    )


# A factor: a number, or a scalar node and whether it divides.
_Factor = float | tuple[Node, bool]


def _factors(node: Any) -> tuple[Any, list[_Factor]]:
    """Peel factors off ``node``, the last one first."""
    factors: list[_Factor] = []
    while isinstance(node, Node) and (scaled := vocab.scaling_of(node)) is not None:
        node, factor, divides = scaled
        if isinstance(factor, Node):
            factors.append((factor, divides))
        else:
            factors.append(1 / factor if divides else factor)
    return node, factors


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


def _unread(softmax: Node, detail: str) -> Rejection:
    return Rejection(softmax, Reason.ATTENTION_UNREADABLE, f"softmax {softmax.name}: {detail}")
