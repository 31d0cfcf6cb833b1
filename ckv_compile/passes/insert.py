"""Insert one eviction node per site and re-point the cache outputs at it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from ..config import EvictionConfig
from ..methods.evict import EvictKV
from ..site import AttentionSite, Phase, Reason, Rejection
from ..sizes import number_of
from . import vocabulary as vocab
from .axes import chain_above


@torch.library.custom_op("ckv_compile::capacity", mutates_args=())
def capacity_marker(
    capacity: torch.Tensor,
    tokens: torch.Tensor,
    padding: torch.Tensor | None = None,
    row_budgets: torch.Tensor | None = None,
    gap: torch.Tensor | None = None,
    strict: bool = False,
) -> torch.Tensor:
    """Make ``capacity`` (empty, its size the budget for ``tokens``) an input of the traced graph.

    ``row_budgets`` ``[B]`` are the budgets of the rows that the mask ``padding`` pads; both None
    without padding. ``gap`` is None for a fresh prefill; else ``tokens`` come behind what an
    eviction left, it counts the tokens that are missing there, and so does ``padding``.
    ``strict``: a cache that counts other tokens than these must stay whole.

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

    def fits(self, site: AttentionSite) -> bool:
        """Whether the site caches exactly the tokens that the budget counts."""
        shape = vocab.shape_of(self.tokens)
        return shape is not None and len(shape) > 1 and vocab.known(shape[1] == site.q_len)

    def counts_rows_of(self, site: AttentionSite) -> bool:
        """Whether the rows were counted on the very mask that pads this site; neither is as well.

        A mask's cast is still that mask.
        """
        if site.padding is None:
            return self.padding is None
        gap = vocab.value_of(self.gap)
        aligned = gap is None or vocab.known(number_of(gap) == site.padding_offset)
        return aligned and chain_above(site.padding)[-1] is self.padding and self.fits(site)


def phase_of(capacity: Capacity | None) -> Phase:
    """Which calls are cut; without a capacity the first piece of a prompt."""
    return "prefill" if capacity is None or capacity.gap is None else "continuation"


@dataclasses.dataclass(frozen=True)
class Inserted:
    """An eviction node and the site it serves."""

    site: AttentionSite
    node: Node
    module: EvictKV


def take_capacity(gm: GraphModule) -> Capacity | None:
    """Remove the capacity marker from the graph and say what it marked."""
    found = None
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in (
            torch.ops.ckv_compile.capacity,
            torch.ops.ckv_compile.capacity.default,
        ):
            found = Capacity(*node.args)
            gm.graph.erase_node(node)
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
        cut = site.phase == phase_of(capacity)
        if cut and rows.strict and not rows.fits(site):
            reason = Reason.UNCOUNTED_TOKENS
            came_in = vocab.shape_of(rows.tokens) or "others"
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
) -> tuple[Inserted, ...]:
    """Add ``ckv_evict_i(query, key, value, o_proj_weight, scale)`` behind each site of a prefill.

    before: ``k, v -> sdpa -> .. -> linear``; the graph returns ``k, v``
    after:  the same, ``k', v' = ckv_evict_i(q, k, v, W_O, ..)``; it returns ``k', v'``

    Attention in this call still reads all of K and V; only what the cache keeps is cut. A later
    piece of a prompt is cut like its first one, if the ``capacity`` says so. A graph
    that has eviction nodes already is left as it is, so a second run inserts nothing.
    """
    cut = [site for site in sites if site.phase == phase_of(capacity)]
    done = any(isinstance(module, EvictKV) for module in gm.modules())
    if done or (config.budget.keeps_everything and capacity is None):  # type: ignore[union-attr]
        cut = []
    entry = sum(row_bytes(site) for site in cut)
    inserted = tuple(_insert(gm, site, config, capacity, entry) for site in cut)
    gm.graph.lint()
    gm.recompile()
    return inserted


def row_bytes(site: AttentionSite) -> int:
    """Of one entry in the site's cache, for a batch of one."""
    values = (vocab.value_of(node) for node in (site.cache_key, site.cache_value))
    return sum(value.shape[1] * value.shape[3] * value.itemsize for value in values)


def _insert(
    gm: GraphModule,
    site: AttentionSite,
    config: EvictionConfig,
    capacity: Capacity | None,
    entry: int,
) -> Inserted:
    given = capacity is not None and capacity.fits(site)
    module = EvictKV(config, site.projection.in_out, not given, entry)
    name = f"ckv_evict_{site.index}"
    gm.add_submodule(name, module)
    cached = (site.cache_key, site.cache_value)
    read = (site.key, site.value) if site.latent else cached
    graph = gm.graph
    with graph.inserting_before(site.projection.node):
        weight = _matrix_of(gm, site)
    args = (site.query, *read, weight, site.scale, site.softcap)
    if given:
        assert capacity is not None
        padded = (site.padding, capacity.row_budgets, capacity.gap)
        args = (*args, capacity.node, *(padded if site.padding is not None else ()))
    with graph.inserting_after(site.projection.node):
        kwargs = {"cached": cached} if site.latent else {}
        node = graph.call_module(name, args, kwargs)
    with graph.inserting_after(node):
        value = graph.call_function(operator.getitem, (node, 1))
        key = graph.call_function(operator.getitem, (node, 0))
    vocab.annotate(node, module, like=site.sdpa)
    for new in (key, value):
        vocab.annotate(new, operator.getitem, like=site.sdpa)
    _repoint(gm, dict.fromkeys(site.key_outputs, key) | dict.fromkeys(site.value_outputs, value))
    return Inserted(site, node, module)


def _matrix_of(gm: GraphModule, site: AttentionSite) -> Node:
    """The projection's weight with two axes, ``[H*D, E]`` if it has three."""
    weight, axes = site.projection.weight, site.projection.weight_axes
    if axes:
        weight = gm.graph.call_method("permute", (weight, *axes))
        vocab.annotate(weight, torch.Tensor.permute, like=site.sdpa)
        weight = gm.graph.call_method("flatten", (weight, 0, 1))
        vocab.annotate(weight, torch.Tensor.flatten, like=site.sdpa)
    return weight


def _repoint(gm: GraphModule, new: dict[int, Node]) -> None:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    returned = tuple(new.get(i, value) for i, value in enumerate(vocab.outputs_of(gm)))
    output.args = (returned,)
