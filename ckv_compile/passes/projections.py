"""The output projection ``W_O``: follow the attention output to where all of it has been projected.

The output may fork into branches if they are added up again, as a linear layer and its LoRA are.
On the way every op has to be linear in the output and to leave tokens apart, so that ``W_O`` is the
sum of the products of the matrices along the branches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ..site import Branch, Matrix, Projection, Reason, Rejection
from . import vocabulary as vocab
from .axes import Layout, labelled, names_of, text_of, through
from .einsum import Contraction, contraction_of
from .nodes import annotate, argument, called, is_subclass, name_of, shape_of, value_of


@dataclasses.dataclass(frozen=True)
class _Form:
    """A value that is linear in the attention output: the sum of ``terms`` of it.

    ``features`` names the axis that a further matrix has to contract, ``gates`` are the products
    by which the output was gated before.
    """

    layout: Layout
    features: str
    terms: tuple[Branch, ...] = (Branch(),)
    gates: tuple[Node, ...] = ()

    @property
    def projected(self) -> bool:
        return all(term.matrices for term in self.terms)


def projection_of(output: Node, sizes: tuple[Any, ...]) -> Projection | Rejection:
    """Push ``[B, H, Q, D]`` downwards to the first node that all of the output is projected to.

    Args:
        output: the attention output.
        sizes: its four sizes; H and D are ints.
    """
    # A projection contracts exactly H slow and D fast, or W_O^h is not a slice of it.
    features = "".join(names_of(labelled("HD", sizes[1::2])))
    forms = {output: _Form(labelled("BHQD", sizes), features)}
    # Whatever reads a value of the output is met here, in the graph's order, and refused if it is
    # not understood: so no weight, gate or bias that is met depends on the output.
    waiting, fork = {output: _readers(output)}, ""
    for node in _behind(output):
        read = {source: forms[source] for source in forms if node in waiting[source]}
        if not read:
            continue
        fork = fork or _fork(waiting)
        form = _behind_op(node, read)
        if isinstance(form, Rejection):
            return _in_fork(form, fork)
        forms[node], waiting[node] = form, _readers(node)
        for source in read:
            waiting[source].remove(node)
            if not waiting[source]:
                del forms[source], waiting[source]
        if list(forms) == [node] and form.projected:
            return _projection(node, form, fork)
    detail = f"{', '.join(node.name for node in forms)} is not projected"
    return _in_fork(Rejection(output, Reason.NO_PROJECTION, detail), fork)


def _behind(node: Node) -> Iterator[Node]:
    while (node := node.next).op != "output":
        yield node


def _readers(node: Node) -> set[Node]:
    return {u for u in node.users if u.op != "output" and not vocab.only_measures(u, node)}


def _fork(waiting: Mapping[Node, set[Node]]) -> str:
    """Where the output is used more than once, in words."""
    for node, readers in waiting.items():
        if len(readers) > 1:
            return f"{node.name} is used by {', '.join(sorted(user.name for user in readers))}"
    return ""


def _in_fork(rejection: Rejection, fork: str) -> Rejection:
    if not fork or rejection.reason is Reason.TRAINING:
        return rejection
    detail = f"{fork}; {rejection.detail}"
    return dataclasses.replace(rejection, reason=Reason.OUTPUT_FORKS, detail=detail)


def _behind_op(node: Node, read: Mapping[Node, _Form]) -> _Form | Rejection:
    """What ``node`` makes of the values that it reads."""
    unread = f"{node.name} ({name_of(node)}) stands before the projection"
    if vocab.is_add(node):
        return _sum(node, read) or Rejection(node, Reason.OUTPUT_OP, unread)
    if len(read) > 1:
        return Rejection(node, Reason.OUTPUT_OP, unread)
    ((source, form),) = read.items()
    contraction = contraction_of(node, source)
    if contraction is not None:
        return _contracted(node, form, contraction)
    matrix = _matrix_of(node, source)
    if matrix is not None:
        return matrix if isinstance(matrix, Rejection) else _times(form, matrix)
    if vocab.is_training_dropout(node):
        return Rejection(node, Reason.TRAINING, f"{node.name} is a dropout in training mode")
    if form.projected:
        scaled = _scaled(node, source, form)
        if scaled is not None:
            return scaled
    elif vocab.factor_of(node, source) is not None:
        # W_O diag(gate) is another matrix for each query; the scores see W_O alone.
        return dataclasses.replace(form, gates=(*form.gates, node))
    op = vocab.layout_op_of(node)
    if op is None or node.args[0] is not source:
        return Rejection(node, Reason.OUTPUT_OP, unread)
    layout = through(op, form.layout, shape_of(node) or ())
    if layout is None:
        return Rejection(node, Reason.OUTPUT_AXES, f"{node.name} mixes the axes of the output")
    return dataclasses.replace(form, layout=layout)


def _sum(node: Node, read: Mapping[Node, _Form]) -> _Form | None:
    """Two branches that meet again; None if ``node`` adds something else."""
    parts = [read.get(arg) for arg in node.args[:2] if isinstance(arg, Node)]
    if len(read) != 2 or None in parts or not _may_write(node):
        return None
    first, second = (part for part in parts if part is not None)
    alike = names_of(first.layout) == names_of(second.layout) and first.gates == second.gates
    if not alike or not first.projected or not second.projected:
        return None
    return dataclasses.replace(first, terms=first.terms + second.terms)


def _scaled(node: Node, source: Node, form: _Form) -> _Form | None:
    """A branch times a number."""
    scaling = vocab.scaling_of(node)
    if scaling is None or scaling[0] is not source or not _may_write(node):
        return None
    _, factor, divides = scaling
    if divides and isinstance(factor, Node):
        return None
    factor = 1 / factor if divides else factor
    terms = (dataclasses.replace(t, factors=(*t.factors, factor)) for t in form.terms)
    return dataclasses.replace(form, terms=tuple(terms))


def _may_write(node: Node) -> bool:
    """Whether nobody else sees what ``node`` writes in place, if it does."""
    written = node.args[0]
    if not vocab.is_in_place(node) or not isinstance(written, Node):
        return True
    return len(written.users) == 1 and vocab.layout_op_of(written) is None


def _matrix_of(node: Node, source: Node) -> Matrix | Rejection | None:
    """The matrix by which ``node`` multiplies ``source`` from the right."""
    if vocab.is_opaque_linear(node, source):
        if _identity_value(node, source) is None:
            detail = f"{node.name} ({name_of(node)}) cannot be applied to the identity"
            return Rejection(node, Reason.OUTPUT_OP, detail)
        return Matrix(node, argument(node, 1, "weight"), in_out=True, opaque=True)
    operands = vocab.projection_operands(node, source)
    if operands is None:
        return None
    if is_subclass(value_of(operands[0])):
        kind = type(value_of(operands[0])).__name__
        detail = f"{operands[0].name} is a {kind}, whose numbers cannot be read"
        return Rejection(node, Reason.OUTPUT_OP, detail)
    return Matrix(node, *operands)


def _times(form: _Form, matrix: Matrix) -> _Form | Rejection:
    if names_of(form.layout)[-1] != form.features:
        detail = f"the projection reads {text_of(form.layout)}, not [.., H*D]"
        return Rejection(matrix.node, Reason.OUTPUT_AXES, detail)
    (out,) = labelled("E", (shape_of(matrix.node) or ())[-1:])
    terms = tuple(dataclasses.replace(t, matrices=(*t.matrices, matrix)) for t in form.terms)
    layout = (*form.layout[:-1], out)
    return _Form(layout, names_of((out,))[0], terms, form.gates)


def _contracted(node: Node, form: _Form, found: Contraction) -> _Form | Rejection:
    """A projection that is an einsum: it sums over the axis ``H*D``, or over both axes H and D."""
    names = names_of(form.layout)
    summed = {names[axis]: other for axis, other in found.met.items()}
    if set(summed) == {form.features}:
        matrix = Matrix(node, found.weight, in_out=found.free == 1)
    elif len(summed) == 2 and set(summed) == set(form.features) and not form.projected:
        first, second = (summed[name] for name in form.features)
        matrix = Matrix(node, found.weight, in_out=True, axes=(first, second, found.free))
    else:
        detail = f"the projection {node.args[0]!r} reads {text_of(form.layout)}, not all of H and D"
        return Rejection(node, Reason.OUTPUT_AXES, detail)
    at = found.order.index(None)
    (out,) = labelled("E", (shape_of(node) or ())[at : at + 1])
    layout = tuple(out if axis is None else form.layout[axis] for axis in found.order)
    terms = tuple(dataclasses.replace(t, matrices=(*t.matrices, matrix)) for t in form.terms)
    return _Form(layout, names_of((out,))[0], terms, form.gates)


def _projection(node: Node, form: _Form, fork: str) -> Projection | Rejection:
    """One of the branches is the projection, the others are added to it."""
    bases = [term for term in form.terms if len(term.matrices) == 1 and not term.factors]
    if not bases:
        detail = f"{fork}; none of the branches is a linear layer by itself"
        return Rejection(node, Reason.OUTPUT_FORKS, detail)
    adapters = tuple(term for term in form.terms if term is not bases[0])
    return Projection(node, bases[0].matrices[0], adapters, gated=bool(form.gates))


def _identity_value(node: Node, source: Node) -> Any:
    """What an opaque linear makes of the identity, as a fake tensor; None if it cannot."""
    value, size = value_of(source), (shape_of(source) or (None,))[-1]
    if not isinstance(size, int):
        return None
    mode = value.fake_mode if isinstance(value, FakeTensor) else contextlib.nullcontext()
    try:
        with mode:
            identity = torch.eye(size, dtype=value.dtype, device=value.device)
            args, kwargs = vocab.weight_alone(node, identity)
            values = torch.fx.node.map_arg((args, kwargs), value_of)
            found = called(node)(*values[0], **values[1])
    except Exception:  # somebody else's op, which says in its own way that it will not
        return None
    plain = isinstance(found, torch.Tensor) and not is_subclass(found)
    return found if plain and found.dim() == 2 and found.shape[0] == size else None


def insert_weight(graph: Graph, projection: Projection) -> tuple[Node, tuple[Any, ...]]:
    """``W_O`` and its adapters as arguments of the eviction node, where the graph inserts nodes.

    An adapter is its matrices, ``[in, out]`` each, and its factors. A quantised weight is read by
    applying its op to the identity:

    before: ``y = linear(x, quantised, bias)``
    after:  the same, and ``weight = linear(eye, quantised)``

    This is done anew at each eviction and costs that layer as many tokens more as it has inputs:
    kept, the numbers would take the memory that quantising them has saved.
    """
    base = projection.matrix
    weight = _insert_matrix(graph, base) if base.opaque or base.axes else base.weight
    adapters = tuple(
        (tuple(_insert_matrix(graph, matrix) for matrix in branch.matrices), branch.factors)
        for branch in projection.adapters
    )
    return weight, adapters


def _insert_matrix(graph: Graph, matrix: Matrix) -> Node:
    """``[in, out]``"""
    if matrix.axes:
        permuted = graph.call_method("permute", (matrix.weight, *matrix.axes))
        annotate(permuted, torch.Tensor.permute, like=matrix.node)
        flat = graph.call_method("flatten", (permuted, 0, 1))
        annotate(flat, torch.Tensor.flatten, like=matrix.node)
        return flat
    if not matrix.opaque and matrix.in_out:
        return matrix.weight
    if matrix.opaque:
        value = value_of(matrix.node.args[0])
        like = {"dtype": value.dtype, "device": value.device}
        identity = graph.call_function(torch.eye, (value.shape[-1],), like)
        args, kwargs = vocab.weight_alone(matrix.node, identity)
        new = [identity, graph.create_node(matrix.node.op, matrix.node.target, args, kwargs)]
    else:
        new = [graph.call_method("t", (matrix.weight,))]
    for node in new:
        annotate(node, called(node), like=matrix.node)
    return new[-1]
