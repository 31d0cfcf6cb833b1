"""When a call leaves its cache cut: prompts, their pieces, later turns, bounds and blocks."""

from __future__ import annotations

from typing import Any

from .config import EvictionConfig
from .inputs import cache_room
from .sizes import TAIL


def cuts(config: EvictionConfig, cache: Any, q_len: int, *, fresh: bool) -> bool:
    """Whether a call of ``q_len`` tokens leaves ``cache`` cut; ``fresh``: it has seen none yet."""
    if fresh:
        # An encoder's entries are cut at the first call, be it of one token.
        cutting = q_len >= (1 if config.cross_attention else 2)
    elif q_len > 1:
        cutting = would_cut_again(config, cache) and _can_cut_again(config, cache)
    else:
        cutting = q_len == 1 and not cache_room().takes_back(cache) and _is_full(config, cache)
    return cutting and bool(cache_room().counts_all(cache))


def would_cut_again(config: EvictionConfig, cache: Any) -> bool:
    """Whether several more tokens are a piece of a prompt, or a turn that is cut."""
    room = cache_room()
    turn = config.later_turns == "evict" and not room.takes_back(cache)
    return turn or bool(room.in_prompt(cache))


def why_whole(config: EvictionConfig, cache: Any) -> str:
    """Why several more tokens stay whole where others would be cut; "" where nobody wonders."""
    packs = config.packs or cache_room().is_packed(cache)
    if not packs or _fits_form(config, cache) or not would_cut_again(config, cache):
        return ""
    if config.chooses_policies:
        return "policies are chosen on its first piece, and applied again as tokens follow"
    if config.weighs_layers:
        return "allocation='cake' weighs layers by the attention of its first piece"
    if config.reads_rotation:
        return f"{config.scored_by} reads the rotation of a prompt's first piece"
    if config.packs and not cache_room().has_policies(cache):
        return (
            f"{config.scored_by} looks at several heads at once, which now hold different entries"
        )
    return "another method or allocation has packed it"


def _can_cut_again(config: EvictionConfig, cache: Any) -> bool:
    return _fits_form(config, cache) and bool(cache_room().can_cut_again(cache))


def _fits_form(config: EvictionConfig, cache: Any) -> bool:
    """Whether a budget can be shared out anew in the form in which the cache holds its entries."""
    room = cache_room()
    if room.has_policies(cache) or config.chooses_policies:
        return False
    return config.cuts_packed if config.packs else not room.is_packed(cache)


def _is_full(config: EvictionConfig, cache: Any) -> bool:
    """Whether one token more takes the cache over its bound, or ends a block under policies."""
    room = cache_room()
    if config.chooses_policies:
        since = room.most_held(cache) + 1 - TAIL
        held = room.has_policies(cache) and since >= config.interval
        return held and bool(room.can_cut_again(cache))
    most = config.max_entries
    return most is not None and room.most_held(cache) + 1 > most and _can_cut_again(config, cache)
