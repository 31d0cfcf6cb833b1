"""Cut layers to heads of different lengths, in packed form; all layers of a graph or none.

A cache of ours asks for it, by a marker beside each attention, and by another one says in later
calls that packed entries stand before the tail that it shows (see ``attend``). Both are there where
what is packed is cut again, with the tokens since.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import EvictionConfig
from ..methods.evict import ScoreKV
from ..methods.pack import PackKV
from ..methods.ragged import ScorePacked
from ..site import AttentionSite, Reason, Rejection
from . import vocabulary as vocab
from .insert import Capacity, Inserted, phase_of, repoint, sites_asked_for
from .nodes import annotate, outputs_of, value_of
from .projections import insert_weight

# These choose within a layer, so that it can be cut as soon as it has been read.
_BY_LAYER = ("adakv",)


@torch.library.custom_op("ckv_compile::packed", mutates_args=())
def packed_marker(key: Tensor, value: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ask in a traced graph for what is left of ``[B, Hkv, K, *]``, in packed form.

    ``total`` counts the budgets of all rows, see ``sized``. Returns packed keys and values and
    where the heads begin. Where no pass has been here nothing is packed: they are empty.
    """
    heads = key.shape[0] * key.shape[1]
    return (
        key.new_empty(0, key.shape[3]),
        value.new_empty(0, value.shape[3]),
        key.new_zeros(heads + 1, dtype=torch.int32),
    )


@packed_marker.register_fake
def _(key: Tensor, value: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = key.shape[0] * key.shape[1]
    return (
        key.new_empty(0, key.shape[3]),
        value.new_empty(0, value.shape[3]),
        key.new_empty(heads + 1, dtype=torch.int32),
    )


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One layer's marker: the rows' budgets, and which outputs of the graph take what it gives."""

    total: Node
    outputs: tuple[tuple[int, ...], ...]


def take_packed(gm: GraphModule) -> dict[Node, Wanted]:
    """What the caches want packed, by their keys. The markers stay for layers that are not cut."""
    found = {}
    returned = outputs_of(gm)
    for node in gm.graph.nodes:
        if vocab.is_ours(node, "packed"):
            key, _, total = node.args
            parts: tuple[list[int], ...] = ([], [], [])
            for part in node.users:
                if part.target is operator.getitem:
                    parts[part.args[1]].extend(i for i, v in enumerate(returned) if v is part)
            found[key] = Wanted(total, tuple(tuple(part) for part in parts))
    return found


def without_unpacked(
    sites: Sequence[AttentionSite],
    rejections: Sequence[Rejection],
    wanted: Mapping[Node, object],
    config: EvictionConfig,
    capacity: Capacity | None,
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Reject what cannot be packed, and with one layer of a cache all: a mask must fit them all."""
    if not config.packs:
        return tuple(sites), tuple(rejections)
    phase = phase_of(capacity)
    cut = [site for site in sites if site.phase == phase]
    wrong = {site.index: _unpackable(site, wanted) for site in cut}
    first = next((detail for detail in wrong.values() if detail), "")
    unread = len(wanted) - sum(site.cache_key in wanted for site in cut)
    if unread and not first:
        first = f"{unread} layers of the same cache are left alone"
    if config.allocation not in (*_BY_LAYER, "uniform") and not first:
        first = unlike(cut)
    left = [site for site in sites if site.phase != phase or not first]
    if first:
        for site in cut:
            detail = wrong[site.index] or first
            rejections = (*rejections, Rejection(site.sdpa, Reason.NOT_PACKED, detail, site.name))
    again = (dataclasses.replace(site, index=i) for i, site in enumerate(left))
    return tuple(again), tuple(rejections)


def _unpackable(site: AttentionSite, wanted: Mapping[Node, object]) -> str:
    """Why later calls could not read the site's entries in packed form; "" if they could."""
    if site.cache_key not in wanted:
        return f"{site.cache_key.name} is kept by a cache that takes no packed entries"
    return unpackable(site)


def unpackable(site: AttentionSite) -> str:
    """The same of the attention itself, whatever its cache."""
    if site.latent:
        return "K and V are made of one latent head"
    if not vocab.is_sdpa(site.sdpa):
        return "its attention is not scaled_dot_product_attention"
    if site.biases or site.sinks is not None or site.softcap is not None:
        return "its logits have a bias, sinks or a soft cap"
    return ""


def unlike(sites: Sequence[AttentionSite]) -> str:
    """Why the layers could not share one store and one budget; "" if they can."""
    sizes = {(s.num_key_value_heads, s.head_dim, s.value_head_dim) for s in sites}
    if len(sizes) > 1:
        return f"layers of unlike sizes {sorted(sizes)} cannot share one budget"
    return ""


def insert_packing(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    config: EvictionConfig,
    capacity: Capacity | None,
    wanted: dict[Node, Wanted],
    prefixes: Mapping[Node, tuple[Node, Node, Node]],
    recent: Mapping[int, Node],
    expected: Mapping[Node, Node] | None = None,
) -> tuple[Inserted, ...]:
    """Score each site, pack layers together, and give the cache what is left.

    before: ``k, v -> sdpa``; the graph returns ``k, v`` and three empty tensors
    after:  ``k, v -> sdpa``, ``s = ckv_score_i(q, k, v, W_O)``, and behind the last of a group
            ``K, V, cu, k', v', .. = ckv_pack_j(ks, vs, ss)``, which it returns; k' is two tokens

    Args:
        prefixes: what is packed already, before each layer's keys.
        recent: the last queries by site, for a call of a single token.
    """
    cut = sites_asked_for(gm, sites, capacity, wanted, recent, PackKV)
    if not cut or capacity is None:
        return ()
    by_layer = config.allocation in _BY_LAYER
    groups = [[site] for site in cut] if by_layer else [cut]
    inserted: list[Inserted] = []
    for number, group in enumerate(groups):
        before = [prefixes[site.cache_key] for site in group if site.cache_key in prefixes]
        scores = [
            _score(gm, site, config, capacity, prefixes, recent, (expected or {}).get(site.sdpa))
            for site in group
        ]
        inserted += _pack(gm, f"ckv_pack_{number}", group, scores, config, capacity, wanted, before)
    gm.graph.lint()
    gm.recompile()
    return tuple(inserted)


def _pack(
    gm: GraphModule,
    name: str,
    group: Sequence[AttentionSite],
    scores: Sequence[Node],
    config: EvictionConfig,
    capacity: Capacity,
    wanted: dict[Node, Wanted],
    before: Sequence[tuple[Node, Node, Node]],
) -> list[Inserted]:
    graph = gm.graph
    width = len(value_of(scores[0]))
    last, kwargs = scores[-1], {}
    with graph.inserting_after(last):
        module = PackKV(config)
        gm.add_submodule(name, module)
        node = graph.call_module(name, ())
    parts: list[tuple[Node, ...]] = []
    with graph.inserting_before(node):
        for i in range(width):
            parts.append(tuple(_part(graph, score, i, group[0]) for score in scores))
    if config.weighs_layers:
        kwargs["preferences"] = parts.pop()
    args: tuple[Any, ...] = (
        tuple(site.cache_key for site in group),
        tuple(site.cache_value for site in group),
        *_paired(parts[:: 2 if before else 1]),
        capacity.node,
        wanted[group[0].cache_key].total,
    )
    node.args = (*args, group[0].padding, capacity.row_budgets, capacity.gap)
    if before:
        packed = tuple(zip(*before, strict=True))
        node.args = (*node.args, (*packed, *_paired(parts[1::2])))
    node.kwargs = kwargs
    annotate(node, module, like=group[0].sdpa)
    inserted = []
    # The capacity's size is the budget; shared out, the total is the same.
    entries = value_of(capacity.node).shape[0]
    held = _per_head(before, group)
    for i, site in enumerate(group):
        # The packed K and V and the heads' beginnings; then the tails of K and V.
        first = 2 + 3 * i
        outputs = dict.fromkeys(site.key_outputs, first + 1)
        outputs |= dict.fromkeys(site.value_outputs, first + 2)
        for place, taken in zip((0, 1, first), wanted[site.cache_key].outputs, strict=True):
            outputs |= dict.fromkeys(taken, place)
        with graph.inserting_after(node):
            nodes = {p: graph.call_function(operator.getitem, (node, p)) for p in outputs.values()}
        for part in nodes.values():
            annotate(part, operator.getitem, like=site.sdpa)
        repoint(gm, {position: nodes[place] for position, place in outputs.items()})
        inserted.append(Inserted(site, node, module, entries, outputs, held))
    return inserted


def _paired(parts: Sequence[tuple[Node, ...]]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Scores and norms, of which there may be none."""
    return parts[0], parts[1] if len(parts) > 1 else ()


def _per_head(before: Sequence[tuple[Node, Node, Node]], group: Sequence[AttentionSite]) -> Any:
    """Packed entries per head, on average."""
    stores = {key: value_of(key).shape[0] for key, _, _ in before}
    heads = sum(site.num_key_value_heads for site in group) * group[0].batch_size
    return sum(stores.values()) // heads if stores else 0


def _score(
    gm: GraphModule,
    site: AttentionSite,
    config: EvictionConfig,
    capacity: Capacity,
    prefixes: Mapping[Node, tuple[Node, Node, Node]],
    recent: Mapping[int, Node],
    expected: Node | None,
) -> Node:
    graph = gm.graph
    projection = site.projection if config.reads_projection else None
    before = prefixes.get(site.cache_key, ())
    module = (ScorePacked if before else ScoreKV)(
        config, projection is not None and projection.matrix.in_out
    )
    name = f"ckv_score_{site.index}"
    gm.add_submodule(name, module)
    query = recent[site.index] if site.phase == "decode" else site.query
    end = site.sdpa if projection is None else projection.node
    with graph.inserting_before(end.next):
        weight, adapters = insert_weight(graph, projection) if projection else (None, ())
        operands = (query, *before, site.cache_key, site.cache_value, weight)
        args = (*operands, site.scale, site.padding, capacity.gap)
        kwargs: dict[str, Any] = {"adapters": adapters} if adapters else {}
        if expected is not None:
            kwargs["expected"] = expected
        node = graph.call_module(name, args, kwargs)
    annotate(node, module, like=site.sdpa)
    return node


def _part(graph: torch.fx.Graph, node: Node, index: int, site: AttentionSite) -> Node:
    part = graph.call_function(operator.getitem, (node, index))
    annotate(part, operator.getitem, like=site.sdpa)
    return part
