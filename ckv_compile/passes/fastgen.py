"""Give each head of a packed cache what FastGen's policy for it keeps, and apply it again later.

A cache of ours asks for it by a marker beside each attention, as it does for an allocation (see
``pack``); what is packed is read by ``attend`` in either case.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import EvictionConfig
from ..methods.fastgen import FastGen, State
from ..site import AttentionSite
from . import vocabulary as vocab
from .insert import Capacity, Inserted, repoint, sites_asked_for
from .nodes import annotate, outputs_of, value_of

# Outputs of the node: a state of so many tensors, and behind them the tails of K and V.
_STATE = 9


@torch.library.custom_op("ckv_compile::profiled", mutates_args=())
def profiled_marker(
    key: Tensor, value: Tensor, kinds: Tensor, before: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ask in a traced graph for what policies leave of ``[B, Hkv, K, *]``, see ``FastGen``.

    Where no pass has been here nothing is left: all that is returned is empty.
    """
    return _empty(key)


@profiled_marker.register_fake
def _(key: Tensor, value: Tensor, kinds: Tensor, before: list[Tensor]) -> State:
    return _empty(key)


def _empty(key: Tensor) -> State:
    none = [key.new_empty(0) for _ in range(_STATE)]
    return none[0], none[1], none[2], none[3], none[4], none[5], none[6], none[7], none[8]


@dataclasses.dataclass(frozen=True)
class Profiled:
    """One layer's marker: what it names, and which outputs of the graph take what it gives."""

    kinds: Node
    before: tuple[Node, ...]
    outputs: dict[int, int]


def take_profiled(gm: GraphModule) -> dict[Node, Profiled]:
    """What the caches want, by their keys. The markers stay for layers that are not cut."""
    found = {}
    returned = outputs_of(gm)
    for node in gm.graph.nodes:
        if vocab.is_ours(node, "profiled"):
            key, _, kinds, before = node.args
            parts = [part for part in node.users if part.target is operator.getitem]
            outputs = {
                i: part.args[1] for part in parts for i, v in enumerate(returned) if v is part
            }
            found[key] = Profiled(kinds, tuple(before), outputs)
    return found


def insert_policies(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    config: EvictionConfig,
    capacity: Capacity | None,
    wanted: dict[Node, Profiled],
    recent: Mapping[int, Node],
) -> tuple[Inserted, ...]:
    """Let a node behind each attention choose or apply the policies of its heads.

    before: ``k, v -> sdpa``; the graph returns ``k, v`` and empty tensors
    after:  the same, and ``K, V, cu, .., k', v' = ckv_fastgen_i(q, k, v, ..)``, which it returns
    """
    cut = sites_asked_for(gm, sites, capacity, wanted, recent, FastGen)
    if not cut or capacity is None:
        return ()
    inserted = tuple(
        _insert(gm, site, config, capacity, wanted[site.cache_key], recent) for site in cut
    )
    gm.graph.lint()
    gm.recompile()
    return inserted


def _insert(
    gm: GraphModule,
    site: AttentionSite,
    config: EvictionConfig,
    capacity: Capacity,
    profiled: Profiled,
    recent: Mapping[int, Node],
) -> Inserted:
    assert config.recovery is not None
    graph, module = gm.graph, FastGen(config.recovery)
    name = f"ckv_fastgen_{site.index}"
    gm.add_submodule(name, module)
    query = recent[site.index] if site.phase == "decode" else site.query
    operands = (query, site.cache_key, site.cache_value, site.scale, site.padding, capacity.gap)
    with graph.inserting_before(site.sdpa.next):
        node = graph.call_module(name, (*operands, profiled.kinds, profiled.before))
    annotate(node, module, like=site.sdpa)
    outputs = dict(profiled.outputs)
    outputs |= dict.fromkeys(site.key_outputs, _STATE)
    outputs |= dict.fromkeys(site.value_outputs, _STATE + 1)
    parts: dict[int, Node] = {}
    for place in sorted(set(outputs.values()), reverse=True):
        with graph.inserting_after(node):
            parts[place] = graph.call_function(operator.getitem, (node, place))
        annotate(parts[place], operator.getitem, like=site.sdpa)
    repoint(gm, {i: parts[place] for i, place in outputs.items()})
    # How much stays is known only when it runs.
    return Inserted(site, node, module, value_of(capacity.node).shape[0], outputs)
