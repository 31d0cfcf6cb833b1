"""Turn a prompt's queries to the positions that follow it: what Expected Attention scores by.

A rotary embedding multiplies parts of a query by cosines and sines of its position and adds them.
Whatever the order of the parts, that is linear in cosines and sines: over many positions the mean
rotation is the same steps with mean cosines and mean sines. So nothing is computed but by the
model's own ops, and no form of rotation has to be known: interleaved, by halves, of a part of the
head, scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..site import AttentionSite, Phase, Reason, Rejection
from . import vocabulary as vocab
from .axes import chain_above, upstream
from .nodes import annotate, called, fake_mode_of, known, shape_of, value_of

# The positions behind the prompt over which rotations are averaged (arXiv 2510.00636).
HORIZON = 512


class NextPositions(nn.Module):
    """``ckv_next_i`` in the graph: the positions behind each row's last token."""

    def forward(self, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        """``[.., Q]`` to ``[.., 512]``; the last columns of ``padding`` are false at pads."""
        if padding is not None:
            q_len = positions.shape[-1]
            real = padding.narrow(1, padding.shape[1] - q_len, q_len).bool()
            positions = torch.where(real, positions, 0)
        last = positions.amax(-1, keepdim=True)
        return last + 1 + torch.arange(HORIZON, device=last.device, dtype=last.dtype)


class MeanAngle(nn.Module):
    """``ckv_angle_i`` in the graph: the mean of cosines or sines, in each one's place."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, later: Tensor, own: Tensor) -> Tensor:
        """Of ``later`` angles, 512 along the axis, as many as ``own`` has there."""
        sizes = list(later.shape)
        sizes[self.axis] = own.shape[self.axis]
        return later.mean(self.axis, keepdim=True).expand(sizes)

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"axis={self.axis}"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a site's query is turned: ``angles`` hold cosines and sines of ``positions``.

    ``steps`` lead from them to the query; ``axes`` say where in each the tokens are.
    """

    angles: tuple[Node, ...]
    positions: Node
    steps: frozenset[Node]
    axes: tuple[int, ...]


def without_unread(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    rejections: Sequence[Rejection],
    cut: Phase,
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Reject the sites of ``cut`` calls whose rotation is not understood."""
    left: list[AttentionSite] = []
    for site in sites:
        read = rotation_of(gm, site) if site.phase in (cut, "cross") else None
        if isinstance(read, str):
            rejections = (*rejections, Rejection(site.query, Reason.ROTATION, read, site.name))
        else:
            left.append(dataclasses.replace(site, index=len(left)))
    return tuple(left), tuple(rejections)


def turn_queries(gm: GraphModule, sites: Sequence[AttentionSite], cut: Phase) -> dict[Node, Node]:
    """The queries under the mean rotation, ``[B, H, Q, D]``, by the attention of each site.

    before: ``c, s = cos(p f), sin(p f); q = x c + turned(x) s; sdpa(q, ..)``
    after:  the same, and ``c' = mean(cos(p' f)), ..; q' = x c' + turned(x) s'``, p' the next 512
    """
    made: dict[tuple[Any, ...], Node] = {}
    found: dict[Node, Node] = {}
    if any(isinstance(module, NextPositions) for module in gm.modules()):
        return found
    for site in sites:
        if site.phase == cut:
            rotation = rotation_of(gm, site)
            assert isinstance(rotation, Rotation)
            found[site.sdpa] = _turn(gm, site, rotation, made)
    return found


def rotation_of(gm: GraphModule, site: AttentionSite) -> Rotation | str:
    """What turns the site's query, or why that is not understood."""
    if site.softcap is not None or site.biases or site.sinks is not None:
        return "its logits have a bias, sinks or a soft cap, whose expectation is not known"
    reader = _Reader()
    angles, sources = reader.parts_of(site.query)
    name = site.query.name
    if not angles:
        return f"{name} is not seen to be made of cosines and sines of positions"
    if reader.again or len(sources) != 1:
        return f"{name} is made of {len(sources)} tensors, some of them rotated before"
    steps = {node for node in reader.known if reader.turns(node)}
    if any(vocab.is_in_place(node) for node in steps):
        return f"{name} is written in place"
    positions = _positions_of(angles, site)
    if isinstance(positions, str):
        return positions
    ordered = tuple(node for node in gm.graph.nodes if node in angles)
    return _tried(gm, site, Rotation(ordered, positions, frozenset(steps), ()))


class _Reader:
    """What a query is linear in: the angles that it is made of, and what they multiply."""

    def __init__(self) -> None:
        self.known: dict[Node, tuple[frozenset[Node], frozenset[Node]]] = {}
        self.again = False

    def turns(self, node: Node) -> bool:
        """Whether the node was read and holds angles, or what is made of them."""
        angles, _ = self.known.get(node, (frozenset(), None))
        return bool(angles) and not vocab.is_angle(node)

    def parts_of(self, node: Node) -> tuple[frozenset[Node], frozenset[Node]]:
        """The angles above ``node``, and the tensors that they turn or that pass beside them."""
        if node not in self.known:
            self.known[node] = self._read(node)
        return self.known[node]

    def _read(self, node: Node) -> tuple[frozenset[Node], frozenset[Node]]:
        factors = vocab.factors_of(node)
        if factors is not None:
            held = [self._angles_of(one) for one in factors]
            if bool(held[0]) == bool(held[1]):
                return frozenset(), frozenset({node})
            angles, other = (held[0], factors[1]) if held[0] else (held[1], factors[0])
            inner, sources = self.parts_of(other)
            self.again |= bool(inner)
            return angles, sources
        operands = vocab.linear_operands(node)
        if not operands:
            return frozenset(), frozenset({node})
        parts = [self.parts_of(one) for one in operands]
        angles = frozenset().union(*(part[0] for part in parts))
        if not angles and vocab.sums(node):
            return frozenset(), frozenset({node})
        return angles, frozenset().union(*(part[1] for part in parts))

    def _angles_of(self, node: Node) -> frozenset[Node]:
        """The angles of which ``node`` is nothing but parts, scaled; empty if it is more."""
        if vocab.is_angle(node):
            return frozenset({node})
        operands = [] if vocab.sums(node) else vocab.linear_operands(node)
        held = [self._angles_of(one) for one in operands]
        if not held or not all(held):
            return frozenset()
        angles = frozenset().union(*held)
        self.known[node] = angles, frozenset()
        return angles


def _positions_of(angles: Iterable[Node], site: AttentionSite) -> Node | str:
    """The positions ``[B or 1, Q]`` or ``[Q]`` of which the angles are made."""
    found: set[Node] = set()
    todo, seen = list(angles), set(angles)
    while todo:
        for above in todo.pop().all_input_nodes:
            value = value_of(above)
            if above in seen or not isinstance(value, Tensor):
                continue
            seen.add(above)
            whole = vocab.is_counting(above) or not value.is_floating_point()
            rows = _rows_of(above, site) if whole else None
            # Others count frequencies.
            if rows is None:
                todo.append(above)
            else:
                found.add(rows)
    if len(found) != 1:
        return f"its cosines and sines are made of {len(found)} tensors of positions"
    (positions,) = found
    if not _counts(positions):
        return f"{positions.name} is not seen to count tokens"
    return positions


def _rows_of(node: Node, site: AttentionSite) -> Node | None:
    """The same positions as ``[B or 1, Q]``, or if they never are as ``[Q]``; None for others."""
    for rank in (2, 1):
        for above in reversed(chain_above(node)):
            shape = shape_of(above) or ()
            if len(shape) == rank and known(shape[-1] == site.q_len):
                return above
    return None


def _counts(node: Any) -> bool:
    """Whether a tensor comes in from outside or counts tokens, from some number on."""
    if not isinstance(node, Node):
        return False
    if node.op == "placeholder" or vocab.is_counting(node):
        return True
    if vocab.layout_op_of(node) is not None:
        return _counts(node.args[0])
    if vocab.is_add(node) and len(node.args) == 2:
        tensors = [arg for arg in node.args if isinstance(value_of(arg), Tensor)]
        return len(tensors) == 1 and _counts(tensors[0])
    return False


def _tried(gm: GraphModule, site: AttentionSite, rotation: Rotation) -> Rotation | str:
    """The rotation with its axes; or why its ops cannot be run for other positions.

    Run on example values, before anything is inserted.
    """
    values = {node: value_of(node) for node in (*rotation.angles, rotation.positions)}
    padding = value_of(site.padding)
    axes = []
    try:
        with fake_mode_of([*values.values(), value_of(site.query)]):
            later = {rotation.positions: NextPositions()(values[rotation.positions], padding)}
            _run(gm, upstream(rotation.angles), later)
            means = {}
            for node in rotation.angles:
                own, new = values[node], later[node]
                axis = _axis_of(tuple(own.shape), tuple(new.shape), site.q_len)
                if axis is None:
                    return f"{node.name} is {tuple(own.shape)}, and {tuple(new.shape)} for others"
                axes.append(axis)
                means[node] = MeanAngle(axis)(new, own)
            _run(gm, rotation.steps, means)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"its rotation cannot be made for other positions: {str(error).splitlines()[0]}"
    turned, query = tuple(means[site.query].shape), shape_of(site.query) or ()
    if len(turned) != len(query) or not all(map(_same, turned, query)):
        return f"its rotation is {turned} for other positions, and not {query}"
    return dataclasses.replace(rotation, axes=tuple(axes))


def _same(one: Any, other: Any) -> bool:
    return known(one == other)


def _axis_of(own: Sequence[Any], new: Sequence[Any], q_len: Any) -> int | None:
    """Where 512 later positions stand in the place of the call's own; None unless it is certain."""
    if len(own) != len(new):
        return None
    places = [i for i, size in enumerate(own) if _same(size, q_len) and _same(new[i], HORIZON)]
    if len(places) != 1:
        return None
    rest = [i for i in range(len(own)) if i not in places]
    # One row of positions may have become one for each row of the batch.
    alike = all(_same(own[i], new[i]) or (i == 0 and _same(own[i], 1)) for i in rest)
    return places[0] if alike else None


def _run(gm: GraphModule, nodes: Iterable[Node], values: dict[Node, Any]) -> None:
    """What ``nodes`` give if some have other ``values``, which are added to."""
    nodes = set(nodes)
    for node in gm.graph.nodes:  # operands come first
        if node not in nodes or node in values or not set(node.all_input_nodes) & values.keys():
            continue
        if node.op not in ("call_function", "call_method"):
            raise TypeError(f"{node.name} is a {node.op}")
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda n: values.get(n, value_of(n))
        )
        values[node] = called(node)(*args, **kwargs)


def _turn(
    gm: GraphModule, site: AttentionSite, rotation: Rotation, made: dict[tuple[Any, ...], Node]
) -> Node:
    """Insert the copies; layers that share angles share their means."""
    positions, padding = rotation.positions, site.padding
    means = {}
    for angle, axis in zip(rotation.angles, rotation.axes, strict=True):
        key = (angle, padding)
        if key not in made:
            if (positions, padding) not in made:
                args = (positions,) if padding is None else (positions, padding)
                made[positions, padding] = _call(gm, site, "ckv_next", NextPositions(), args)
            later = {positions: made[positions, padding]}
            _copy(gm, upstream([angle]), later, site.sdpa)
            made[key] = _call(gm, site, "ckv_angle", MeanAngle(axis), (later[angle], angle))
        means[angle] = made[key]
    _copy(gm, rotation.steps, means, site.sdpa)
    return means[site.query]


def _call(
    gm: GraphModule, site: AttentionSite, kind: str, module: nn.Module, args: tuple[Node, ...]
) -> Node:
    name = f"{kind}_{sum(name.startswith(kind) for name, _ in gm.named_children())}"
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(site.sdpa):
        node = gm.graph.call_module(name, args)
    annotate(node, module, like=site.sdpa)
    return node


def _copy(gm: GraphModule, nodes: Iterable[Node], new: dict[Node, Node], before: Node) -> None:
    """Copy those of ``nodes`` that are made of a key of ``new``, which is added to."""
    nodes = set(nodes)
    for node in list(gm.graph.nodes):
        if node in nodes and node not in new and set(node.all_input_nodes) & new.keys():
            with gm.graph.inserting_before(before):
                copied = gm.graph.node_copy(node, lambda n: new.get(n, n))
            annotate(copied, called(copied), like=node)
            new[node] = copied
