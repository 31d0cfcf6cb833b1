"""The whole rewrite of one graph, in one screen."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule

from ..config import EvictionConfig
from ..site import AttentionSite, Rejection
from .attend import attend_packed, take_prefixes
from .bias import place_biases
from .einsum import spell_out_einsums
from .fastgen import insert_policies, take_profiled
from .fold import fold_groups
from .insert import Inserted, insert_eviction, phase_of, take_capacity, without_uncounted
from .match import match_sites
from .nodes import outputs_of
from .pack import insert_packing, take_packed, without_unpacked
from .positions import without_counting_caches
from .recent import keep_queries
from .rotation import turn_queries, without_unread
from .verify import verify


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What the passes found in one graph and did to it."""

    sites: tuple[AttentionSite, ...]
    rejections: tuple[Rejection, ...]
    inserted: tuple[Inserted, ...]
    folded: tuple[AttentionSite, ...] = ()


def rewrite(
    gm: GraphModule,
    config: EvictionConfig,
    *,
    training: bool = False,
    grad_enabled: bool = False,
    counted: bool = False,
) -> Rewritten:
    """Cut the caches that ``gm`` returns to the budget, in place.

    ``counted``: only those whose tokens the graph's own capacity marker counts.
    """
    # The budget may come as an input of the graph; its marker must go before anything else reads.
    capacity = take_capacity(gm)
    prefixes = take_prefixes(gm)
    # The readers know products as matmuls alone.
    spell_out_einsums(gm)
    place_biases(gm)
    sites, rejections = match_sites(
        gm,
        training=training,
        grad_enabled=grad_enabled,
        cut=phase_of(capacity),
        tokens=None if capacity is None else capacity.tokens,
        cross=config.cross_attention,
        projected=config.reads_projection,
    )
    sites, rejections = without_uncounted(sites, rejections, capacity, counted)
    # Our own caches know how many tokens they have seen.
    if not counted and not (capacity is not None and capacity.strict):
        sites, rejections = without_counting_caches(sites, rejections)
    if config.reads_rotation:
        sites, rejections = without_unread(gm, sites, rejections, phase_of(capacity))
    wanted, profiled = take_packed(gm), take_profiled(gm)
    both = {**wanted, **profiled}
    sites, rejections = without_unpacked(sites, rejections, both, config, capacity)
    recent = keep_queries(gm, sites, config.queries_kept)
    turns = config.reads_rotation
    expected = turn_queries(gm, sites, phase_of(capacity)) if turns else {}
    before = outputs_of(gm)
    # What is packed is cut; the other pass finds it done.
    packed = insert_packing(gm, sites, config, capacity, wanted, prefixes, recent, expected)
    packed += insert_policies(gm, sites, config, capacity, profiled, recent)
    done = {one.site.index for one in packed}
    rest = [site for site in sites if site.index not in done]
    inserted = (*packed, *insert_eviction(gm, rest, config, capacity, recent, expected))
    dense = attend_packed(gm, sites, prefixes, config.lowering)
    folded = fold_groups(gm, dense) if config.rewrite_gqa else ()
    # Always last: a wrong graph must not run.
    verify(gm, before, inserted)
    return Rewritten(sites, rejections, inserted, folded)
