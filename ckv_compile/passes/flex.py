"""Read ``flex_attention``: what its ``mask_mod`` hides and what its ``score_mod`` makes of a score.

Both are small graphs over scalars. Read are the causal mask, in either of them, and a soft cap;
whatever else they do is refused. The indices of a block mask are taken to be those of its
``mask_mod``, which alone decides where flex runs without a kernel of its own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..site import Reason, Rejection
from . import mask_vocabulary as mask_vocab
from . import vocabulary as vocab
from .attention import Attention, soft_cap_of
from .nodes import known, name_of, shape_of, value_of


@dataclasses.dataclass(frozen=True)
class _Position:
    """``q_idx + offset`` or ``kv_idx + offset``."""

    axis: str
    offset: Any = 0


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Which keys query ``i`` sees: all, or where ``causal`` those up to ``i + shift``."""

    causal: bool = False
    shift: Any = 0


@dataclasses.dataclass(frozen=True)
class _Score:
    """``softcap * tanh(factor * score / softcap)``, hidden where ``seen`` says so."""

    factor: Any = 1.0
    softcap: Any = None
    seen: _Seen = _Seen()


def find_flex(gm: GraphModule) -> Iterator[Attention | Rejection]:
    """Every ``flex_attention`` in graph order."""
    for node in gm.graph.nodes:
        if vocab.is_flex(node):
            yield _read_flex(gm, node)


def _read_flex(gm: GraphModule, node: Node) -> Attention | Rejection:
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if 0 not in parts or len(parts) != len(node.users):
        return _unread(node, "its output is not taken alone")
    # A gate made of the log-sum-exp depends on every key, and would look like a foreign factor.
    if any(_below(parts[i]) & _below(parts[0]) for i in parts if i != 0):
        return _unread(node, "its log-sum-exp is used")
    q_len, kv_len = ((shape_of(operand) or (0, 0, 0))[2] for operand in (query, key))
    # One query is at the end of all keys: what is hidden from it, and how it scores, cuts nothing.
    read = (_Score(), _Seen()) if known(q_len == 1) else _mods(gm, score_mod, block_mask[-1])
    if isinstance(read, str):
        return Rejection(node, Reason.MASK_UNREADABLE, f"{node.name}: {read}")
    score, seen = read
    if seen.causal and not known(seen.shift == kv_len - q_len):
        detail = f"{node.name}: query i sees the keys up to i + {seen.shift}"
        return Rejection(node, Reason.MASK_UNREADABLE, detail)
    if score.factor != 1 and not isinstance(scale, (int, float)):
        return _unread(node, "its scale is more than one factor")
    return Attention(
        anchor=node,
        output=parts[0],
        query=query,
        key=key,
        value=value,
        terms=(),
        is_causal=seen.causal,
        scale=scale if score.factor == 1 else scale * score.factor,
        softcap=score.softcap,
    )


def _below(node: Node) -> set[Node]:
    """All that is computed from ``node``."""
    found, todo = set(), [node]
    while todo:
        new = [user for user in todo.pop().users if user not in found and user.op != "output"]
        found |= set(new)
        todo += new
    return found


def _mods(gm: GraphModule, score_mod: Node, mask_mod: Node) -> tuple[_Score, _Seen] | str:
    """What the two functions do together, or which of them is not read."""
    score = _result(gm, score_mod, (_Score(), None, None, _Position("Q"), _Position("K")))
    mask = _result(gm, mask_mod, (None, None, _Position("Q"), _Position("K")))
    if not isinstance(score, _Score):
        return "its score_mod is more than a soft cap or a causal mask"
    if not isinstance(mask, _Seen):
        return "its mask_mod is more than q_idx >= kv_idx"
    seen = _both(mask, score.seen)
    return "its masks differ" if seen is None else (score, seen)


def _result(gm: GraphModule, mod: Node, given: tuple[Any, ...]) -> Any:
    """What the function gives back when called with ``given``; None if that is not read."""
    graph = getattr(gm, str(mod.target)).graph
    values: dict[Node, Any] = {}
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        # What follows the scalars is captured from outside: numbers are read, tensors are not.
        values[node] = given[i] if i < len(given) else None
    (output,) = graph.find_nodes(op="output")
    return _read(output.args[0][0] if isinstance(output.args[0], tuple) else output.args[0], values)


def _read(node: Any, values: dict[Node, Any]) -> Any:
    if isinstance(node, Node) and node not in values:
        values[node] = _read_op(node, values)
    return values.get(node) if isinstance(node, Node) else None


def _read_op(node: Node, values: dict[Node, Any]) -> Any:
    name = name_of(node)
    if mask_vocab.is_all_true(node):
        return _Seen()
    if vocab.is_add(node) or name in ("sub", "__sub__"):
        return _shifted(node, values)
    if mask_vocab.is_less_equal(node) or mask_vocab.is_greater_equal(node):
        later, earlier = (_read(arg, values) for arg in node.args[:2])
        if mask_vocab.is_less_equal(node):
            later, earlier = earlier, later
        axes = [one.axis if isinstance(one, _Position) else "" for one in (later, earlier)]
        return _Seen(True, later.offset - earlier.offset) if axes == ["Q", "K"] else None
    if mask_vocab.is_and(node):
        first, second = (_read(arg, values) for arg in node.args[:2])
        plain = isinstance(first, _Seen) and isinstance(second, _Seen)
        return _both(first, second) if plain else None
    if name == "where" and len(node.args) == 3 and node.args[2] == -torch.inf:
        seen, score = _read(node.args[0], values), _read(node.args[1], values)
        if not isinstance(seen, _Seen) or not isinstance(score, _Score):
            return None
        both = _both(seen, score.seen)
        return None if both is None else dataclasses.replace(score, seen=both)
    return _scored(node, values)


def _shifted(node: Node, values: dict[Node, Any]) -> _Position | None:
    position, step = _read(node.args[0], values), node.args[1]
    step = value_of(step) if isinstance(step, Node) else step
    plain = isinstance(step, (int, torch.SymInt)) and not isinstance(step, bool)
    if not isinstance(position, _Position) or not plain or node.kwargs:
        return None
    down = name_of(node) in ("sub", "__sub__")
    return _Position(position.axis, position.offset + (-step if down else step))


def _scored(node: Node, values: dict[Node, Any]) -> _Score | None:
    """A scaled or soft-capped score."""
    found = soft_cap_of(node)
    if found is None:
        return None
    inner, factor, softcap = found
    score = _read(inner, values) if inner is not node else None
    number = isinstance(factor, (int, float)) and isinstance(softcap, (int, float, type(None)))
    # A mask inside would be capped as well; twice a cap is none.
    if score != _Score() or not number:
        return None
    return _Score(factor, softcap)


def _both(first: _Seen, second: _Seen) -> _Seen | None:
    if first.causal and second.causal and not known(first.shift == second.shift):
        return None
    return first if first.causal else second


def _unread(node: Node, detail: str) -> Rejection:
    return Rejection(node, Reason.ATTENTION_UNREADABLE, f"{node.name}: {detail}")
