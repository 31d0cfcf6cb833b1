"""``torch.export``: a new program whose prefill returns the cut cache, in ATen and ops of ours.

Nothing runs in front of an exported program: the budget is the configuration's, and pads cannot be
counted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import _ShapeEnvGuardError
from torch.fx.node import map_arg

from .backend import report_of_graph
from .config import EvictionConfig
from .passes import vocabulary as vocab
from .passes.aliases import written_nodes
from .passes.attention import find_attentions
from .passes.axes import chain_above, upstream
from .passes.insert import Inserted, insert_eviction
from .passes.match import match_sites, module_path_of
from .passes.nodes import derive, fake_mode_of, outputs_of, shape_of, value_of
from .passes.pipeline import Rewritten
from .passes.verify import VerificationError, verify
from .report import NOTHING_MATCHED, Report
from .site import AttentionSite, Reason, Rejection

log = logging.getLogger("ckv_compile")


def optimize_program(
    program: ExportedProgram, config: EvictionConfig
) -> tuple[ExportedProgram, Report]:
    """A new program that returns each cache cut to the budget; all other outputs are the same.

    Warns where nothing is cut, with the reasons.

    Raises:
        ValueError: the program is optimised already; or a method that programs do not take.
    """
    gm, found, report = _rewritten(program, config)
    log.info("%s", report.summary())
    if not found.inserted and not config.budget.keeps_everything:  # type: ignore[union-attr]
        warnings.warn(f"ckv_compile: {_nothing(report)}", UserWarning, stacklevel=3)
    _inline(gm, found.inserted)
    signature = _signature(program, gm, found.inserted)
    return program._update(gm, signature), report


def explain_program(program: ExportedProgram, config: EvictionConfig) -> Report:
    """What ``optimize_program`` would do."""
    return _rewritten(program, config)[2]


def _rewritten(
    program: ExportedProgram, config: EvictionConfig
) -> tuple[GraphModule, Rewritten, Report]:
    """A copy of the program's graph with eviction nodes, and what was found in it."""
    if any(vocab.is_ours(node) for node in program.graph.nodes):
        raise ValueError("the program is optimised already; give the one that torch.export made")
    if config.reads_rotation:
        raise ValueError(
            f"method={config.method!r} with base={config.base!r} reads how a model rotates its "
            f"queries, which is not read of exported programs; optimise the model"
        )
    gm = _copied(program.graph_module)
    training = any(vocab.is_training_dropout(node) for node in gm.graph.nodes)
    sites, rejections = match_sites(gm, training=training, projected=config.reads_projection)
    sites, refused = _refused(program, gm, sites)
    before = outputs_of(gm)
    with _every_length(gm):
        inserted = insert_eviction(gm, sites, config)
    verify(gm, before, inserted)
    rejections = (*rejections, *refused)
    found = Rewritten(sites, _with_unreachable(gm, sites, rejections), inserted)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return gm, found, report_of_graph(found, config, names)


def _copied(gm: GraphModule) -> GraphModule:
    """A deep copy whose nodes have the same names: a signature speaks of nodes by name."""
    new = copy.deepcopy(gm)
    for old, node in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        node.name = old.name  # an input called "input" would have become "input_1"
    new.recompile()
    return new


def _refused(
    program: ExportedProgram, gm: GraphModule, sites: Sequence[AttentionSite]
) -> tuple[tuple[AttentionSite, ...], list[Rejection]]:
    """The sites that may be cut here, and the others with a reason."""
    specs, written = program.graph_signature.output_specs, written_nodes(gm)
    kinds = [spec.kind for spec in specs]
    left: list[AttentionSite] = []
    refused: list[Rejection] = []
    for site in sites:
        why = _reason(site, kinds, written) if site.phase == "prefill" else None
        if why is None:
            left.append(site)
        else:
            refused.append(Rejection(site.sdpa, *why, site.name))
    return tuple(left), refused


def _reason(
    site: AttentionSite, kinds: Sequence[OutputKind], written: set[Node]
) -> tuple[Reason, str] | None:
    if site.padding is not None:
        detail = f"{site.padding.name} says which tokens are pads: the program must not take a mask"
        return Reason.PADDING_MASK, detail
    if site.biases:
        detail = "its bias depends on positions, and nothing keeps those of the entries"
        return Reason.BIAS_UNREADABLE, detail
    projection = site.projection
    if projection is not None and (projection.adapters or projection.matrix.opaque):
        detail = "adapters or quantised weights: merge them, or dequantise, before the export"
        return Reason.OUTPUT_OP, detail
    for i in (*site.key_outputs, *site.value_outputs):
        if kinds[i] is not OutputKind.USER_OUTPUT:
            detail = f"output {i} updates a {kinds[i].name.split('_')[0].lower()}, whose size stays"
            return Reason.CACHE_NOT_FOUND, detail
    read = [site.query, site.sdpa]
    operands = [site.key, site.value]
    if projection is not None:
        read.append(projection.node)
        operands.append(projection.matrix.weight)
    for operand in operands:
        read += chain_above(operand)
    # Of a mask, and of latents that become K and V, all that computes them was read.
    computed = [*site.terms, *((site.key, site.value) if site.latent else ())]
    spoilt = (upstream(computed) | set(read)) & written
    if spoilt:
        names = ", ".join(sorted(node.name for node in spoilt))
        detail = f"{names} may be written in place; call program.run_decompositions({{}}) first"
        return Reason.WRITTEN_IN_PLACE, detail
    return None


def _with_unreachable(
    gm: GraphModule, sites: Sequence[AttentionSite], rejections: Sequence[Rejection]
) -> tuple[Rejection, ...]:
    """And the attentions that no pass sees: in graphs of their own, or taken to pieces."""
    found = list(rejections)
    for name, inner in gm.named_modules():
        if isinstance(inner, GraphModule) and inner is not gm:
            for attention in find_attentions(inner):
                node = attention.node if isinstance(attention, Rejection) else attention.anchor
                detail = f"{node.name} stands in {name}, a graph of its own"
                found.append(Rejection(node, Reason.NESTED_GRAPH, detail, module_path_of(node)))
    pieces = [] if sites else list(filter(vocab.is_decomposed_attention, gm.graph.nodes))
    found = [rejection for rejection in found if rejection.node not in pieces]
    for node in pieces:
        detail = f"{node.name} is what run_decompositions() left of an attention"
        found.append(Rejection(node, Reason.DECOMPOSED, detail, module_path_of(node)))
    return tuple(found)


def _inline(gm: GraphModule, inserted: Sequence[Inserted]) -> None:
    """Put the eviction nodes' own ops in their places: a program is saved without modules.

    before: ``k', v' = ckv_evict_0(q, k, v, W_O)``, a call of a module
    after:  ``aten.gather(..), .., ckv_compile.select(..), k' = aten.gather(k, ..), v' = ..``
    """
    bodies: dict[str, torch.fx.Graph] = {}
    for eviction in inserted:
        node = eviction.node
        operands = list(dict.fromkeys(node.all_input_nodes))
        # Layers mostly differ in their weights alone, and tracing takes longer than all the rest.
        alike = _likeness(eviction, operands)
        if alike not in bodies:
            with _every_length(gm):
                bodies[alike] = _traced(eviction, operands)
        body = bodies[alike]
        copies = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
        with gm.graph.inserting_before(node):
            values = gm.graph.graph_copy(body, copies)
        for old, new in copies.items():
            if old.op != "placeholder":
                derive(new, node)
                new._rename(f"{node.target}_{old.name}")
        for item in list(node.users):
            item.replace_all_uses_with(values[item.args[1]])
            gm.graph.erase_node(item)
        gm.graph.erase_node(node)
        delattr(gm, node.target)
    gm.graph.lint()
    gm.recompile()


@contextlib.contextmanager
def _every_length(gm: GraphModule) -> Iterator[None]:
    """Let nothing that is traced meanwhile hold for some sizes only: a program has no guards."""
    inputs = [shape_of(node) or () for node in gm.graph.nodes if node.op == "placeholder"]
    symbols = [n for n in itertools.chain(*inputs) if isinstance(n, torch.SymInt)]
    shapes: Any = symbols[0].node.shape_env if symbols else None
    for symbol in {n.node.expr for n in symbols if n.node.expr.is_Symbol}:
        # Every trace takes a size for neither 0 nor 1; those of a loaded program have forgotten.
        limits = shapes.var_to_range[symbol]
        if limits.lower < 2 < limits.upper:
            shapes.constrain_symbol_range(symbol, 2, limits.upper)
    try:
        with contextlib.nullcontext() if shapes is None else shapes.error_on_new_guards():
            yield
    except _ShapeEnvGuardError as error:
        raise VerificationError(f"the cut would not hold for every length: {error}") from error


def _traced(eviction: Inserted, operands: Sequence[Node]) -> torch.fx.Graph:
    """The eviction's body as a graph of ATen ops over ``operands``."""
    node = eviction.node

    def body(*given: Any) -> Any:
        given_for = dict(zip(operands, given, strict=True)).__getitem__
        return eviction.module(*map_arg(node.args, given_for), **map_arg(node.kwargs, given_for))

    values = [value_of(operand) for operand in operands]
    # Factories such as arange must make fake tensors as well.
    with torch.no_grad(), fake_mode_of(values), enable_python_dispatcher():
        graph = make_fx(body)(*values).graph
    graph.eliminate_dead_code()
    for constant in graph.find_nodes(op="get_attr"):
        raise VerificationError(f"{eviction.site.name}: the cut holds a constant {constant.target}")
    return graph


def _likeness(eviction: Inserted, operands: Sequence[Node]) -> str:
    """All that the eviction's body is traced from; two of the same have the same body."""
    node = eviction.node
    slot = {operand: f"operand {i}" for i, operand in enumerate(operands)}
    called = map_arg((node.args, node.kwargs), slot.__getitem__)
    values = [value_of(operand) for operand in operands]
    seen = [
        (value.dtype, value.device, value.shape, value.stride())
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    ]
    return f"{eviction.module!r} {called} {seen}"


def _signature(
    program: ExportedProgram, gm: GraphModule, inserted: Sequence[Inserted]
) -> ExportGraphSignature:
    """The program's signature with the names of the new outputs."""
    cut = {i for one in inserted for i in one.outputs}
    specs = [
        dataclasses.replace(spec, arg=TensorArgument(name=node.name)) if i in cut else spec
        for i, (spec, node) in enumerate(
            zip(program.graph_signature.output_specs, outputs_of(gm), strict=True)
        )
    ]
    return dataclasses.replace(program.graph_signature, output_specs=specs)


def _nothing(report: Report) -> str:
    """Why nothing was cut, in one line."""
    phases = sorted({f"a {row.phase}, which is not cut" for row in report.sites})
    # One of each kind: a model has many layers, and explain lists them all.
    rows = {row.reason: row for row in reversed(report.rejections)}
    why = phases + sorted(f"{reason}: {row.detail}" for reason, row in rows.items())
    if report.sites:
        return f"the program is {'; '.join(why)}"
    return f"{NOTHING_MATCHED} ({'; '.join(why) or 'the program has no attention'})"
