"""Insert one eviction node per site and re-point the cache outputs at it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..config import EvictionConfig
from ..methods.evict import EvictKV
from ..methods.fastgen import FastGen
from ..methods.pack import PackKV
from ..site import AttentionSite, Phase, Reason, Rejection
from ..sizes import number_of
from . import vocabulary as vocab
from .axes import chain_above
from .nodes import annotate, argument, called, known, outputs_of, shape_of, value_of
from .projections import insert_weight


@torch.library.custom_op("ckv_compile::capacity", mutates_args=())
def capacity_marker(
    capacity: torch.Tensor,
    tokens: torch.Tensor,
    padding: torch.Tensor | None = None,
    row_budgets: torch.Tensor | None = None,
    gap: torch.Tensor | None = None,
    strict: bool = False,
    key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make ``capacity`` (empty, its size the budget for ``tokens``) an input of the traced graph.

    ``row_budgets`` ``[B]`` are the budgets of the rows that the mask ``padding`` pads; both None
    without padding. ``gap`` is None for a fresh prefill; else ``tokens`` come behind what an
    eviction left, it counts the tokens that are missing there, and so does ``padding``.
    ``strict``: a cache that counts other tokens than these must stay whole. ``key``: what the call
    leaves in the cache beside which the marker stands.

    Returns where the entries stood that stay of ``key``, ``[B, Hkv, budget]``, if attention adds a
    bias that asks for it, or else an empty tensor.

    A budget that is an input costs no second compile when it changes. The pass takes the marker
    out again, so it never runs in a graph that we compile; elsewhere it does nothing.
    """
    return capacity.new_empty(0)


@capacity_marker.register_fake
def _(
    capacity: torch.Tensor,
    tokens: torch.Tensor,
    padding: torch.Tensor | None = None,
    row_budgets: torch.Tensor | None = None,
    gap: torch.Tensor | None = None,
    strict: bool = False,
    key: torch.Tensor | None = None,
) -> torch.Tensor:
    return capacity.new_empty(0)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The budget as a graph input, and the tokens and the mask it was computed for."""

    node: Node | None
    tokens: Node | None
    padding: Node | None = None
    row_budgets: Node | None = None
    gap: Node | None = None
    strict: bool = False
    # Of the markers beside an attention: its key, and the output that takes the positions.
    positions: dict[Node, int] = dataclasses.field(default_factory=dict)

    def fits(self, site: AttentionSite) -> bool:
        """Whether the site caches exactly the tokens that the budget counts."""
        shape = shape_of(self.tokens)
        return shape is not None and len(shape) > 1 and known(shape[1] == site.q_len)

    def counts_rows_of(self, site: AttentionSite) -> bool:
        """Whether the rows were counted on the very mask that pads this site; neither is as well.

        A mask's cast is still that mask.
        """
        if site.padding is None:
            return self.padding is None
        gap = value_of(self.gap)
        aligned = gap is None or known(number_of(gap) == site.padding_offset)
        return aligned and chain_above(site.padding)[-1] is self.padding and self.fits(site)


_MARKED = ("node", "tokens", "padding", "row_budgets", "gap", "strict")


def phase_of(capacity: Capacity | None) -> Phase:
    """Which calls are cut; without a capacity the first piece of a prompt."""
    if capacity is None or capacity.gap is None:
        return "prefill"
    shape = shape_of(capacity.tokens) or (0, 0)
    return "decode" if known(shape[1] == 1) else "continuation"


def sites_asked_for(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    capacity: Capacity | None,
    wanted: Mapping[Node, object],
    recent: Mapping[int, Node],
    kind: type[nn.Module],
) -> list[AttentionSite]:
    """Sites whose caches ask to be packed, by a node of this kind; none where one stands already.

    Args:
        wanted: who asks, by the keys that go into the cache.
        recent: the last queries by site, without which a call of a single token cuts nothing.
    """
    phase = phase_of(capacity)
    cut = [site for site in sites if site.phase == phase and site.cache_key in wanted]
    if phase == "decode":
        cut = [site for site in cut if site.index in recent]
    done = any(isinstance(module, kind) for module in gm.modules())
    fits = bool(cut) and capacity is not None and capacity.fits(cut[0])
    return cut if fits and not done else []


@dataclasses.dataclass(frozen=True)
class Inserted:
    """An eviction node and the site it serves."""

    site: AttentionSite
    node: Node
    module: EvictKV | PackKV | FastGen
    # What is kept per head, on average where heads differ.
    entries: Any
    # Which output of the graph is which of the node's.
    outputs: dict[int, int]
    # What stood packed before the site's keys, on average.
    before: Any = 0


def take_capacity(gm: GraphModule) -> Capacity | None:
    """Remove the capacity marker from the graph and say what it marked."""
    found: Capacity | None = None
    for node in list(gm.graph.nodes):
        if vocab.is_ours(node, "capacity"):
            positions = {} if found is None else found.positions
            marked: dict[str, Any] = dict(zip(_MARKED, node.args, strict=False))
            found = Capacity(**marked, positions=positions)
            for i, value in enumerate(outputs_of(gm)):
                if value is node:
                    positions[argument(node, 6, "key")] = i
            with gm.graph.inserting_before(node):
                nowhere = gm.graph.call_method("new_empty", (node.args[0], 0))
            annotate(nowhere, called(nowhere), like=node)
            node.replace_all_uses_with(nowhere)
            gm.graph.erase_node(node)
            if not nowhere.users:
                gm.graph.erase_node(nowhere)
    return found


def without_uncounted(
    sites: Sequence[AttentionSite],
    rejections: Sequence[Rejection],
    capacity: Capacity | None,
    counted: bool = False,
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Reject sites whose tokens, or whose rows' tokens, nobody has counted.

    A cache that does not follow its rows would show pads to later tokens, and one that counts other
    tokens than the caller would give later ones wrong positions: wrong, silently. A static buffer
    cannot shrink at all.
    """
    rows = capacity or Capacity(None, None, strict=counted)
    left: list[AttentionSite] = []
    for site in sites:
        reason, detail = None, ""
        placed = capacity is not None and site.cache_key in capacity.positions
        # Of cross-attention nothing is asked: an encoder's entries are no tokens of the decoder.
        cut = site.phase == phase_of(capacity)
        if cut and rows.strict and not rows.fits(site):
            reason = Reason.UNCOUNTED_TOKENS
            came_in = shape_of(rows.tokens) or "others"
            detail = f"{site.q_len} tokens are cached where {came_in} came in"
        elif site.phase == "continuation" and not site.key_outputs and not rows.strict:
            # Our own caches are strict. Of others nobody knows how much of the buffer is filled.
            reason = Reason.CACHE_NOT_FOUND
            detail = f"{site.cache_key.name} is a buffer of {site.kv_len} slots, written in place"
        elif cut and not rows.counts_rows_of(site):
            reason = Reason.PADDING_MASK
            detail = (
                f"mask {site.attn_mask} hides {site.padding}, rows are counted on {rows.padding}"
            )
        elif cut and site.biases and not placed:
            reason = Reason.BIAS_UNREADABLE
            detail = "its bias depends on positions, and nothing keeps those of the entries"
        if reason is None:
            left.append(site)
        else:
            rejections = (*rejections, Rejection(site.sdpa, reason, detail, site.name))
    return tuple(left), tuple(rejections)


def insert_eviction(
    gm: GraphModule,
    sites: Sequence[AttentionSite],
    config: EvictionConfig,
    capacity: Capacity | None = None,
    recent: Mapping[int, Node] | None = None,
    expected: Mapping[Node, Node] | None = None,
) -> tuple[Inserted, ...]:
    """Add ``ckv_evict_i(query, key, value, o_proj_weight, scale)`` behind each site of a prefill.

    before: ``k, v -> sdpa -> .. -> linear``; the graph returns ``k, v``
    after:  the same, ``k', v' = ckv_evict_i(q, k, v, W_O, ..)``; it returns ``k', v'``

    Attention in this call still reads all of K and V; only what the cache keeps is cut. A later
    piece of a prompt is cut like its first one, if the ``capacity`` says so, and so is a single
    token's call, scored by the ``recent`` queries of its site. ``expected`` are queries as later
    positions would turn them, by the attention. A graph that has eviction nodes already is left as
    it is, so a second run inserts nothing.
    """
    cut = [site for site in sites if site.phase in (phase_of(capacity), "cross")]
    done = any(isinstance(module, EvictKV) for module in gm.modules())
    if config.budget.keeps_everything:  # type: ignore[union-attr]
        # A budget that is an input may be another one in the next call.
        cut = [site for site in cut if capacity is not None and site.phase != "cross"]
    if done:
        cut = []
    entry = sum(row_bytes(site) for site in cut)
    queries = recent or {}
    if phase_of(capacity) == "decode":
        cut = [site for site in cut if site.index in queries]
    else:
        queries = {}
    later = expected or {}
    inserted = tuple(
        _insert(gm, site, config, capacity, entry, query, later.get(site.sdpa))
        for site in cut
        for query in [queries.get(site.index, site.query)]
    )
    gm.graph.lint()
    gm.recompile()
    return inserted


def row_bytes(site: AttentionSite) -> int:
    """Of one entry in the site's cache, for a batch of one."""
    values = (value_of(node) for node in (site.cache_key, site.cache_value))
    return sum(value.shape[1] * value.shape[3] * value.itemsize for value in values)


def _insert(
    gm: GraphModule,
    site: AttentionSite,
    config: EvictionConfig,
    capacity: Capacity | None,
    entry: int,
    query: Node,
    expected: Node | None,
) -> Inserted:
    cross = site.phase == "cross"
    given = capacity is not None and capacity.fits(site) and not cross
    projection = site.projection if config.reads_projection else None
    in_out = projection is not None and projection.matrix.in_out
    module = EvictKV(config, in_out, not given, entry, cross)
    name = f"ckv_evict_{site.index}"
    gm.add_submodule(name, module)
    graph = gm.graph
    end = site.sdpa if projection is None else projection.node
    with graph.inserting_before(end.next):
        weight, adapters = insert_weight(graph, projection) if projection else (None, ())
        cached = (site.cache_key, site.cache_value)
        read = (site.key, site.value) if site.latent else cached
        args: tuple[Any, ...] = (query, *read, weight, site.scale, site.softcap)
        if given:
            assert capacity is not None
            padded = (site.padding, capacity.row_budgets, capacity.gap)
            args = (*args, capacity.node, *(padded if site.padding is not None else ()))
        kwargs: dict[str, Any] = {"cached": cached} if site.latent else {}
        if site.biases:
            kwargs["biases"] = tuple(bias.node for bias in site.biases)
        if site.sinks is not None:
            kwargs["sinks"] = site.sinks
        if adapters:
            kwargs["adapters"] = adapters
        if expected is not None:
            kwargs["expected"] = expected
        node = graph.call_module(name, args, kwargs)
    annotate(node, module, like=site.sdpa)
    outputs = _outputs_for(site, capacity)
    parts: dict[int, Node] = {}
    for part in sorted(set(outputs.values()), reverse=True):
        with graph.inserting_after(node):
            parts[part] = graph.call_function(operator.getitem, (node, part))
        annotate(parts[part], operator.getitem, like=site.sdpa)
    repoint(gm, {i: parts[part] for i, part in outputs.items()})
    entries = value_of(node)[0].shape[2]
    return Inserted(site, node, module, entries, outputs)


def _outputs_for(site: AttentionSite, capacity: Capacity | None) -> dict[int, int]:
    """Which output of the graph becomes which one of the eviction: K, V or the positions."""
    outputs = dict.fromkeys(site.key_outputs, 0) | dict.fromkeys(site.value_outputs, 1)
    if site.biases and capacity is not None:
        outputs[capacity.positions[site.cache_key]] = 2
    return outputs


def repoint(gm: GraphModule, new: dict[int, Node]) -> None:
    """Let the graph return other values at these positions."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    returned = tuple(new.get(i, value) for i, value in enumerate(outputs_of(gm)))
    output.args = (returned,)
